"""Flash attention over a pack in Triton (Dao 2023, arXiv 2307.08691, with its work laid out for ragged packs).

A tile is a block of query rows of one sample. The host lists the tiles of a pack, those with the most key blocks
first, so that programs that take them in turn end together; a tile visits only the key blocks that its rows may see.
The backward has no atomics: dq by query tiles, dk and dv by key tiles that add up the query heads of their group, so
two runs give the same bits. Statistics and sums are float32; exponentials are base 2. Kernels: triton_kernels.py.

Dimensions: T tokens, N query heads, G key/value heads, H head size, M query rows and C key rows of a block.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch

from npd_kernels.launch import INTERPRETED, Tile, attention_tile, grid, triton_unavailable


def unavailable_reason(device: torch.device) -> str | None:
    """None means available."""
    return triton_unavailable(device)


def packed_attention(q_TNH, k_TGH, v_TGH, cu_seqlens: Sequence[int], scale: float) -> torch.Tensor:
    return _PackedAttention.apply(q_TNH, k_TGH, v_TGH, tuple(cu_seqlens), scale)


def query_tiles(cu_seqlens: Sequence[int], block: int) -> torch.Tensor:
    """int32 [tiles, 3]: first row of the tile, begin and end of its sample; most rows to look back at first."""
    rows = [(row, begin, end) for begin, end in pairwise(cu_seqlens) for row in range(begin, end, block)]
    return torch.tensor(sorted(rows, key=lambda tile: (tile[1] - tile[0], tile[0])), dtype=torch.int32)


def key_tiles(cu_seqlens: Sequence[int], block: int) -> torch.Tensor:
    """The same for key rows; most query rows that look at them first."""
    rows = [(row, begin, end) for begin, end in pairwise(cu_seqlens) for row in range(begin, end, block)]
    return torch.tensor(sorted(rows, key=lambda tile: (tile[0] - tile[2], tile[0])), dtype=torch.int32)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_TNH, k_TGH, v_TGH, cu_seqlens, scale):
        q_TNH, k_TGH, v_TGH = q_TNH.contiguous(), k_TGH.contiguous(), v_TGH.contiguous()
        out_TNH = torch.empty_like(q_TNH)
        lse_TN = torch.empty(q_TNH.shape[:2], dtype=torch.float32, device=q_TNH.device)
        _launch("forward", [q_TNH, k_TGH, v_TGH, out_TNH, lse_TN], cu_seqlens, scale)
        ctx.save_for_backward(q_TNH, k_TGH, v_TGH, out_TNH, lse_TN)
        ctx.cu_seqlens, ctx.scale = cu_seqlens, scale
        return out_TNH

    @staticmethod
    def backward(ctx, d_out_TNH):
        q_TNH, k_TGH, v_TGH, out_TNH, lse_TN = ctx.saved_tensors
        d_out_TNH = d_out_TNH.contiguous()
        d_q_TNH, d_k_TGH, d_v_TGH = (torch.empty_like(x) for x in (q_TNH, k_TGH, v_TGH))
        delta_TN = torch.empty_like(lse_TN)
        inputs = [q_TNH, k_TGH, v_TGH]
        _launch("backward_q", [*inputs, out_TNH, d_out_TNH, lse_TN, delta_TN, d_q_TNH], ctx.cu_seqlens, ctx.scale)
        _launch("backward_kv", [*inputs, d_out_TNH, lse_TN, delta_TN, d_k_TGH, d_v_TGH], ctx.cu_seqlens, ctx.scale)
        return d_q_TNH, d_k_TGH, d_v_TGH, None, None


def _launch(kernel: str, tensors: list[torch.Tensor], cu_seqlens: tuple[int, ...], scale: float) -> None:
    """tensors: as the kernel takes them, q and k first."""
    from . import triton_kernels

    (_, heads, head_size), groups = tensors[0].shape, tensors[1].shape[1]
    device, element_size = tensors[0].device, tensors[0].element_size()
    block = attention_tile(kernel, device.type, head_size, element_size)
    keys = kernel == "backward_kv"
    tiles = _tiles_on(device, keys, cu_seqlens, block.cols if keys else block.rows)
    items = len(tiles) * (groups if keys else heads)
    getattr(triton_kernels, kernel)[grid(items, device, matrix=True)](
        *tensors, tiles, items, scale, **constants(heads, groups, head_size, block), **block.options
    )


@lru_cache(maxsize=16)
def _tiles_on(device: torch.device, keys: bool, cu_seqlens: tuple[int, ...], block: int) -> torch.Tensor:
    """All layers of a model share them, and a copy to the device waits for it."""
    return (key_tiles if keys else query_tiles)(cu_seqlens, block).to(device)


def constants(heads: int, groups: int, head_size: int, block: Tile) -> dict[str, int | bool]:
    """Compile-time constants of the three kernels."""
    return {
        "N": heads,
        "G": groups,
        "H": head_size,
        "P": max(16, 1 << (head_size - 1).bit_length()),
        "M": block.rows,
        "C": block.cols,
        # the interpreter multiplies the bits of bfloat16 as integers
        "UPCAST": INTERPRETED,
    }
