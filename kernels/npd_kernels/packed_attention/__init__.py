"""Causal attention over several samples laid end to end in one pack.

Dimensions: T tokens in the pack, N query heads, G key/value heads, H head size, S samples.
"""

import itertools
from collections.abc import Sequence
from types import ModuleType

import torch

from . import impl_npu, impl_sdpa, impl_triton, reference

IMPLEMENTATIONS: dict[str, ModuleType] = {
    "reference": reference,
    "sdpa": impl_sdpa,
    "triton": impl_triton,
    "npu": impl_npu,
}


def packed_attention(
    q_TNH: torch.Tensor,
    k_TGH: torch.Tensor,
    v_TGH: torch.Tensor,
    cu_seqlens: Sequence[int],
    scale: float,
    *,
    impl: str,
) -> torch.Tensor:
    """Attend causally inside each sample and never across samples; returns [T, N, H] in q's dtype.

    q_TNH, k_TGH, v_TGH: one dtype, one device; N is a multiple of G (grouped-query attention).
    cu_seqlens: S + 1 host integers, strictly rising, from 0 to T: sample s owns tokens cu[s] .. cu[s+1]-1.
        Host integers, because the NPU operator takes a Python list and a device tensor would cost a sync.
    scale: factor on q.k before the softmax, usually H ** -0.5.
    impl: a key of IMPLEMENTATIONS.

    Raises ValueError for shapes or offsets that do not fit, RuntimeError if `impl` cannot run here.
    Differentiable in q, k and v.
    """
    _check(q_TNH, k_TGH, v_TGH, cu_seqlens)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"packed_attention impl {impl!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    module = IMPLEMENTATIONS[impl]
    if reason := module.unavailable_reason(q_TNH.device):
        raise RuntimeError(f"packed_attention impl {impl!r} cannot run here: {reason}")
    return module.packed_attention(q_TNH, k_TGH, v_TGH, cu_seqlens, scale)


def _check(q_TNH, k_TGH, v_TGH, cu_seqlens) -> None:
    if q_TNH.dim() != 3 or k_TGH.dim() != 3 or k_TGH.shape != v_TGH.shape:
        raise ValueError(f"want q [T,N,H] and k, v [T,G,H]; got {[tuple(x.shape) for x in (q_TNH, k_TGH, v_TGH)]}")
    if q_TNH.shape[0] != k_TGH.shape[0] or q_TNH.shape[2] != k_TGH.shape[2] or q_TNH.shape[1] % k_TGH.shape[1]:
        raise ValueError(
            f"q {tuple(q_TNH.shape)} and k {tuple(k_TGH.shape)} do not fit: same T and H, N a multiple of G"
        )
    if not q_TNH.dtype == k_TGH.dtype == v_TGH.dtype:
        raise ValueError(f"q, k, v must share one dtype; got {q_TNH.dtype}, {k_TGH.dtype}, {v_TGH.dtype}")
    rising = all(a < b for a, b in itertools.pairwise(cu_seqlens))
    if len(cu_seqlens) < 2 or cu_seqlens[0] != 0 or cu_seqlens[-1] != q_TNH.shape[0] or not rising:
        raise ValueError(f"cu_seqlens must rise strictly from 0 to T={q_TNH.shape[0]}; got {list(cu_seqlens)[:8]}...")
