"""Flash attention over a pack in Triton (Dao 2023, arXiv 2307.08691, with its work laid out for ragged packs).

A tile is a block of query rows of one sample. The host lists the tiles of a pack, those with the most key blocks
first, so that programs that take them in turn end together; a tile visits only the key blocks that its rows may see.
The backward has no atomics: dq by query tiles, dk and dv by key tiles that add up the query heads of their group, so
two runs give the same bits. Statistics and sums are float32; exponentials are base 2. Kernels: triton_kernels.py.

Dimensions: T tokens, N query heads, G key/value heads, H head size, M query rows and C key rows of a block.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch

from npd_kernels.launch import INTERPRETED, grid_size, triton_unavailable


def unavailable_reason(device: torch.device) -> str | None:
    """None means available."""
    return triton_unavailable(device)


def packed_attention(q_TNH, k_TGH, v_TGH, cu_seqlens: Sequence[int], scale: float) -> torch.Tensor:
    return _PackedAttention.apply(q_TNH, k_TGH, v_TGH, tuple(cu_seqlens), scale)


def blocks(head_size: int, is_float32: bool) -> tuple[int, int]:
    """Query and key rows of a block: what fits the on-chip memory of Ascend 910B (tests/ascend lowers every entry)."""
    if INTERPRETED:
        return 16, 16
    if head_size <= 128:
        return (64, 32) if is_float32 else (128, 64)
    return (32, 16) if is_float32 else (64, 32)


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
        from . import triton_kernels

        q_TNH, k_TGH, v_TGH = q_TNH.contiguous(), k_TGH.contiguous(), v_TGH.contiguous()
        shape = _shape(q_TNH, k_TGH)
        tiles = query_tiles(cu_seqlens, shape["M"]).to(q_TNH.device)
        out_TNH = torch.empty_like(q_TNH)
        lse_TN = torch.empty(q_TNH.shape[:2], dtype=torch.float32, device=q_TNH.device)
        items = len(tiles) * shape["N"]
        triton_kernels.forward[grid_size(items)](q_TNH, k_TGH, v_TGH, out_TNH, lse_TN, tiles, items, scale, **shape)
        ctx.save_for_backward(q_TNH, k_TGH, v_TGH, out_TNH, lse_TN, tiles)
        ctx.cu_seqlens, ctx.scale, ctx.shape = cu_seqlens, scale, shape
        return out_TNH

    @staticmethod
    def backward(ctx, d_out_TNH):
        from . import triton_kernels

        q_TNH, k_TGH, v_TGH, out_TNH, lse_TN, tiles = ctx.saved_tensors
        shape, scale, d_out_TNH = ctx.shape, ctx.scale, d_out_TNH.contiguous()
        d_q_TNH, d_k_TGH, d_v_TGH = (torch.empty_like(x) for x in (q_TNH, k_TGH, v_TGH))
        delta_TN = torch.empty_like(lse_TN)
        items = len(tiles) * shape["N"]
        triton_kernels.backward_q[grid_size(items)](
            q_TNH, k_TGH, v_TGH, out_TNH, d_out_TNH, lse_TN, delta_TN, d_q_TNH, tiles, items, scale, **shape
        )
        tiles = key_tiles(ctx.cu_seqlens, shape["C"]).to(q_TNH.device)
        items = len(tiles) * shape["G"]
        triton_kernels.backward_kv[grid_size(items)](
            q_TNH, k_TGH, v_TGH, d_out_TNH, lse_TN, delta_TN, d_k_TGH, d_v_TGH, tiles, items, scale, **shape
        )
        return d_q_TNH, d_k_TGH, d_v_TGH, None, None


def _shape(q_TNH, k_TGH) -> dict[str, int | bool]:
    """Compile-time constants of the three kernels."""
    rows, cols = blocks(q_TNH.shape[2], q_TNH.dtype == torch.float32)
    return {
        "N": q_TNH.shape[1],
        "G": k_TGH.shape[1],
        "H": q_TNH.shape[2],
        "P": max(16, 1 << (q_TNH.shape[2] - 1).bit_length()),
        "M": rows,
        "C": cols,
        # the interpreter multiplies the bits of bfloat16 as integers
        "UPCAST": INTERPRETED,
    }
