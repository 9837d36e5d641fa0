"""The table that says how each part of the decoder is cut over tensor-parallel ranks, and its application.

Key and value heads: if tp does not divide them, a rank gets a copy of every head that its query heads attend to.
With g = gcd(query heads per rank, query heads per key head), key heads become num_heads / g slots, each serving g
query heads, and slots are cut evenly; openPangu-1B (12 query, 6 key heads) at tp 4 has 12 slots, 3 a rank.
"""

import math
from fnmatch import fnmatch
from typing import Any

from torch import nn

from npd_ascend.errors import UserError
from npd_ascend.model.decoder import Decoder
from npd_ascend.model.families import DecoderConfig
from npd_ascend.model.hf_weights import Piece, whole_pieces
from npd_ascend.parallel.layers import ColumnLinear, OutputNorm, RowLinear, VocabularyEmbedding
from npd_ascend.parallel.mesh import Mesh
from npd_kernels.token_loss import VocabShard

PLAN = {
    "embed": "vocabulary",
    "layers.*.attention_norm": "tokens",
    "layers.*.attention.qkv": "column",
    "layers.*.attention.q_norm": "heads",
    "layers.*.attention.k_norm": "heads",
    "layers.*.attention.out": "row",
    "layers.*.mlp_norm": "tokens",
    "layers.*.mlp.gate_up": "column",
    "layers.*.mlp.down": "row",
    "norm": "tokens",
    "head": "vocabulary",
}


def refusal(config: DecoderConfig, tp: int) -> str | None:
    """Why the model cannot be cut over `tp` ranks, None if it can."""
    if config.num_heads % tp:
        return f"{config.num_heads} attention heads do not divide over parallel.tp={tp}"
    if config.intermediate_size % tp:
        return f"intermediate_size={config.intermediate_size} does not divide over parallel.tp={tp}"
    if config.vocab_size <= (tp - 1) * math.ceil(config.vocab_size / tp):
        return f"vocab_size={config.vocab_size} leaves a rank of parallel.tp={tp} without rows"
    return None


def cut_model(model: Decoder, mesh: Mesh) -> None:
    """Leave this rank's part of a model whose parameters are on the meta device."""
    if mesh.tp == 1:
        return
    if reason := refusal(model.config, mesh.tp):
        raise UserError(f"{reason}; choose another parallel.tp")
    pieces = {
        name: cut_pieces(model.config, name, tuple(parameter.shape), mesh.tp, mesh.tp_rank)
        for name, parameter in model.named_parameters()
    }
    partial = [name for name in pieces if _is_partial(name, mesh)]
    for name, module in list(model.named_modules()):
        if any(True for _ in module.parameters(recurse=False)):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _cut_module(name, module, pieces, mesh))
    slots = kv_slots(model.config, mesh.tp)
    model.kv_copies = slots // model.config.num_kv_heads
    heads = (model.config.num_heads, slots, slots)
    for name in pieces:
        if name.endswith("attention.qkv.weight"):
            attention: Any = model.get_submodule(name.removesuffix(".qkv.weight"))
            attention.split_sizes = [n * model.config.head_dim // mesh.tp for n in heads]
    model.pieces, model.partial_gradients = pieces, frozenset(partial)
    rows = pieces["embed.weight"][0]
    model.vocab_shard = VocabShard(rows.row, rows.row + rows.rows, mesh.tp_group)


def kv_slots(config: DecoderConfig, tp: int) -> int:
    """Key (and value) heads over all ranks, copies included."""
    return config.num_heads // math.gcd(config.num_heads // tp, config.num_heads // config.num_kv_heads)


def cut_pieces(config: DecoderConfig, name: str, shape: tuple[int, ...], tp: int, tp_rank: int) -> list[Piece]:
    """What rank `tp_rank` of `tp` holds of the parameter that is `shape` on a single rank."""
    module, _, leaf = name.rpartition(".")
    wholes, style = whole_pieces(config, name, shape), _style(module)
    if style == "column":
        copies = kv_slots(config, tp) // config.num_kv_heads
        split = [1, copies, copies] if module.endswith("qkv") else [1] * len(wholes)
        return _cut_rows(wholes, split, config.head_dim, tp, tp_rank)
    if style == "vocabulary":
        (whole,) = wholes
        rows = math.ceil(whole.rows / tp)
        first = min(tp_rank * rows, whole.rows)
        return [Piece(name=whole.name, shape=whole.shape, at=0, rows=min(rows, whole.rows - first), row=first)]
    (whole,) = wholes
    if style == "row" and leaf == "weight":
        cols = shape[1] // tp
        return [Piece(name=whole.name, shape=shape, at=0, rows=shape[0], col=tp_rank * cols, cols=cols)]
    return [Piece(name=whole.name, shape=shape, at=0, rows=shape[0], primary=tp_rank == 0)]


def _cut_rows(wholes: list[Piece], copies: list[int], head_dim: int, tp: int, tp_rank: int) -> list[Piece]:
    """Rows of each part of a fused parameter; a part with copies is cut head by head."""
    pieces, at = [], 0
    for whole, n in zip(wholes, copies, strict=True):
        if n == 1:
            rows = whole.rows // tp
            units = [(tp_rank * rows, rows, True)]
        else:
            slots = whole.rows // head_dim * n // tp
            units = [
                (slot // n * head_dim, head_dim, slot % n == 0)
                for slot in range(tp_rank * slots, (tp_rank + 1) * slots)
            ]
        for row, rows, primary in units:
            pieces.append(Piece(name=whole.name, shape=whole.shape, at=at, rows=rows, row=row, primary=primary))
            at += rows
    return pieces


def _style(module: str) -> str:
    for pattern, style in PLAN.items():
        if fnmatch(module, pattern):
            return style
    raise AssertionError(f"{module} has parameters but no line in PLAN; a silent miss would train a wrong model")


def _is_partial(name: str, mesh: Mesh) -> bool:
    """Whether a whole parameter sees only this rank's heads, or only its tokens."""
    module, _, leaf = name.rpartition(".")
    style = _style(module)
    return style == "heads" or (mesh.sequence_parallel and (style == "tokens" or (style == "row" and leaf == "bias")))


def _cut_module(name: str, module: Any, pieces: dict[str, list[Piece]], mesh: Mesh) -> nn.Module:
    def part(leaf: str) -> nn.Parameter | None:
        whole = getattr(module, leaf, None)
        if whole is None:
            return None
        own = pieces[f"{name}.{leaf}"]
        rows = sum(piece.rows for piece in own)
        if style == "vocabulary":
            rows = math.ceil(whole.shape[0] / mesh.tp)
        return nn.Parameter(whole.new_empty(rows, *([own[0].cols or whole.shape[1]] if whole.dim() == 2 else [])))

    style = _style(name)
    if style == "vocabulary":
        return VocabularyEmbedding(part("weight"), pieces[f"{name}.weight"][0].row, mesh)
    if style == "column":
        return ColumnLinear(part("weight"), part("bias"), mesh)
    if style == "row":
        return RowLinear(part("weight"), part("bias"), mesh)
    if name == "norm":
        return OutputNorm(part("weight"), module.eps, module.impl, mesh)
    return module
