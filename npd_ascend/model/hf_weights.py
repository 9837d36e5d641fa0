"""Hugging Face safetensors in and out, tensor by tensor, through one table of names.

The decoder fuses q, k, v and gate, up into one matrix each; a fused parameter is its parts stacked along
dimension 0 in the order of the table. A `Piece` says which rectangle of which Hugging Face tensor some rows of a
parameter are: reading, writing, checkpoints and the cut over tensor-parallel ranks all go by it.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from npd_ascend.errors import UserError
from npd_ascend.model.families import DecoderConfig

if TYPE_CHECKING:
    from npd_ascend.model.decoder import Decoder

_LAYER = {
    "attention_norm": ["input_layernorm"],
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.out": ["self_attn.o_proj"],
    "attention.q_norm": ["self_attn.q_norm"],
    "attention.k_norm": ["self_attn.k_norm"],
    "mlp_norm": ["post_attention_layernorm"],
    "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down": ["mlp.down_proj"],
}
_TOP = {"embed": ["model.embed_tokens"], "norm": ["model.norm"], "head": ["lm_head"]}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Rows `at` to `at + rows` of one of our parameters are a rectangle of a Hugging Face tensor."""

    name: str  # of the Hugging Face tensor
    shape: tuple[int, ...]  # of the whole of it
    at: int
    rows: int
    row: int = 0  # where the rectangle begins there
    col: int = 0
    cols: int | None = None  # None: all of them, or a vector
    primary: bool = True  # False: another piece, here or on another rank, holds the same values

    @property
    def index(self) -> tuple[slice, ...]:
        """The rectangle as an index into the Hugging Face tensor."""
        rows = slice(self.row, self.row + self.rows)
        return (rows,) if self.cols is None else (rows, slice(self.col, self.col + self.cols))


def hf_names(name: str) -> list[str]:
    """Hugging Face names of the parts of our parameter `name`, in stacking order."""
    module, _, leaf = name.rpartition(".")
    if not module.startswith("layers."):
        return [f"{part}.{leaf}" for part in _TOP[module]]
    _, index, inner = module.split(".", 2)
    return [f"model.layers.{index}.{part}.{leaf}" for part in _LAYER[inner]]


def part_sizes(config: DecoderConfig, name: str) -> list[int] | None:
    """Rows of each part of a fused parameter; None where the parameter is a single tensor."""
    if ".qkv." in name:
        return config.qkv_rows
    if ".gate_up." in name:
        return [config.intermediate_size] * 2
    return None


def whole_pieces(config: DecoderConfig, name: str, shape: tuple[int, ...]) -> list[Piece]:
    """Where a parameter of `shape` on a single rank comes from."""
    pieces, at = [], 0
    for part, rows in zip(hf_names(name), part_sizes(config, name) or [shape[0]], strict=True):
        pieces.append(Piece(name=part, shape=(rows, *shape[1:]), at=at, rows=rows))
        at += rows
    return pieces


def hf_shapes(model: "Decoder") -> dict[str, tuple[int, ...]]:
    """Of every whole Hugging Face tensor of the network, by name, whatever part of it is here."""
    return {piece.name: piece.shape for pieces in model.pieces.values() for piece in pieces}


def hf_views(model: "Decoder") -> Iterator[tuple[Piece, torch.Tensor]]:
    """Every piece of every parameter with the rows that hold it, as views."""
    for name, parameter in model.named_parameters():
        for piece in model.pieces[name]:
            yield piece, parameter.detach()[piece.at : piece.at + piece.rows]


@torch.no_grad()
def load_hf_weights(model: "Decoder", folder: Path) -> None:
    """Fill `model` from the safetensors in `folder`, whatever its parameters' dtype; UserError as check_hf_weights.

    Only the rectangles that this rank holds are read; rows that no piece covers (vocabulary padding) become zero.
    """
    files = check_hf_weights(model, folder)
    for name, parameter in model.named_parameters():
        if sum(piece.rows for piece in model.pieces[name]) < len(parameter):
            parameter.zero_()
    for piece, view in hf_views(model):
        with _open(files[piece.name]) as tensors:
            view.copy_(tensors.get_slice(piece.name)[piece.index])


def check_hf_weights(model: "Decoder", folder: Path) -> dict[str, Path]:
    """Which file holds each tensor that `model` wants; the model may be on the meta device.

    UserError on a missing, misshapen or surplus tensor, from the files' headers alone. `rotary_emb.inv_freq`
    buffers, which some checkpoints carry, are computed from the config and passed over; so is a stored copy of a
    tied head.
    """
    wanted = hf_shapes(model)
    passed_over = {"lm_head.weight"} if model.config.tie_embeddings else set()
    stored = _index(Path(folder))
    buffers = {name for name in stored if name.endswith("rotary_emb.inv_freq")}
    if buffers:
        _log.info("%s: %d rotary_emb.inv_freq tensors passed over; config.json decides", folder, len(buffers))
    files = {name: file for name, file in stored.items() if name not in buffers | passed_over}
    for name, file in files.items():
        if name not in wanted:
            raise UserError(f"{file}: tensor {name} has no place in the network that config.json describes")
        with _open(file) as tensors:
            shape = tuple(tensors.get_slice(name).get_shape())
        if shape != wanted[name]:
            raise UserError(f"{file}: {name} is {shape}, config.json wants {wanted[name]}")
    if missing := sorted(wanted.keys() - files.keys()):
        raise UserError(f"{folder}: {len(missing)} tensors are missing from the safetensors, first {missing[0]}")
    return files


def _index(folder: Path) -> dict[str, Path]:
    """Tensor name -> file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = folder / "model.safetensors"
    if not single.exists():
        raise UserError(f"{single}: no such file; only safetensors are read (convert other formats first)")
    with _open(single) as tensors:
        return dict.fromkeys(tensors.keys(), single)


def _open(file: Path):
    try:
        return safe_open(file, "pt")
    except FileNotFoundError:
        raise UserError(f"{file}: named by the index but not there") from None
    except SafetensorError as error:
        raise UserError(f"{file}: damaged ({error}); fetch or export it again") from None
