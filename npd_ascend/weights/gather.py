"""The student's weights as whole Hugging Face tensors, one at a time, on the rank that sends or writes them."""

from collections.abc import Iterator

import torch

from npd_ascend.model.decoder import Decoder
from npd_ascend.parallel.mesh import Mesh, gather_rows
from npd_ascend.parallel.plan import cut_pieces


def whole_tensors(model: Decoder, mesh: Mesh) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every Hugging Face tensor, in the model's dtype.

    To be exhausted by all tensor-parallel ranks of one replica together, since every item is a collective.
    """
    for name, parameter in model.named_parameters():
        if mesh.tp == 1:
            for piece in model.pieces[name]:
                yield piece.name, parameter.detach()[piece.at : piece.at + piece.rows]
            continue
        parts = gather_rows(parameter.detach(), mesh.tp_group)[0].chunk(mesh.tp)
        wholes: dict[str, torch.Tensor] = {}
        for tp_rank, part in enumerate(parts):
            for piece in cut_pieces(model.config, name, tuple(_whole_shape(model, name)), mesh.tp, tp_rank):
                if piece.primary:
                    whole = wholes.setdefault(piece.name, part.new_empty(piece.shape))
                    whole[piece.index] = part[piece.at : piece.at + piece.rows]
        yield from wholes.items()


def _whole_shape(model: Decoder, name: str) -> list[int]:
    """Of the parameter as a single rank has it: its Hugging Face tensors stacked."""
    shapes = {piece.name: piece.shape for piece in model.pieces[name]}.values()
    return [sum(shape[0] for shape in shapes), *next(iter(shapes))[1:]]
