"""torch_npu.npu_fusion_attention over a pack: layout TND with the compressed causal mask.

Source: op-plugin's documentation of npu_fusion_attention. The operator checks little itself (its meta kernel takes an
unknown layout, and lengths that do not add up), so `check` does.

Dimensions: T tokens, N query heads, G key/value heads, H head size.
"""

from collections.abc import Sequence
from functools import cache

import torch

from npd_kernels.launch import npu_unavailable

MAX_SAMPLES = 1024  # of actual_seq_qlen with samples of different lengths; more take several calls
MAX_TOKENS = 1_000_000
MAX_HEADS = 256
MAX_HEAD_SIZE = 768
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Of the mask that sparse modes 2 to 4 take in place of a full one.
_MASK_SIZE = 2048


def unavailable_reason(device: torch.device) -> str | None:
    """None means available."""
    return npu_unavailable(device)


def packed_attention(q_TNH, k_TGH, v_TGH, cu_seqlens: Sequence[int], scale: float) -> torch.Tensor:
    check(q_TNH, k_TGH, v_TGH, cu_seqlens)
    if len(cu_seqlens) - 1 <= MAX_SAMPLES:
        return _attend(q_TNH, k_TGH, v_TGH, list(cu_seqlens[1:]), scale)
    parts = []
    for first in range(0, len(cu_seqlens) - 1, MAX_SAMPLES):
        ends = cu_seqlens[first : first + MAX_SAMPLES + 1]
        at = slice(ends[0], ends[-1])
        parts.append(_attend(q_TNH[at], k_TGH[at], v_TGH[at], [end - ends[0] for end in ends[1:]], scale))
    return torch.cat(parts)


def _attend(q_TNH, k_TGH, v_TGH, ends: list[int], scale: float) -> torch.Tensor:
    """One call of the operator. ends: of the samples, in tokens."""
    import torch_npu

    return torch_npu.npu_fusion_attention(
        q_TNH,
        k_TGH,
        v_TGH,
        q_TNH.shape[1],
        "TND",
        atten_mask=causal_mask(q_TNH.device),
        scale=scale,
        keep_prob=1.0,
        sparse_mode=3,  # rightDownCausal: with equal query and key lengths the plain causal mask of each sample
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
    )[0]


def check(q_TNH, k_TGH, v_TGH, cu_seqlens: Sequence[int]) -> None:
    """ValueError for what the operator would take and compute wrongly, or refuse without a reason."""
    (tokens, heads, head_size), groups = q_TNH.shape, k_TGH.shape[1]
    limits = [
        (tokens, MAX_TOKENS, "tokens in a pack", "lower pack_tokens"),
        (heads, MAX_HEADS, "query heads", "raise parallel.tp"),
        (head_size, MAX_HEAD_SIZE, "as head size", "use kernels.attention: sdpa"),
    ]
    for value, limit, what, way_out in limits:
        if value > limit:
            raise ValueError(f"npu_fusion_attention takes at most {limit:,} {what}; got {value:,}. {way_out}")
    if list(cu_seqlens[:1]) != [0] or cu_seqlens[-1] != tokens or sorted(set(cu_seqlens)) != list(cu_seqlens):
        raise ValueError(f"cu_seqlens must rise strictly from 0 to T={tokens}; got {list(cu_seqlens)[:8]}...")
    if k_TGH.shape != v_TGH.shape or k_TGH.shape[::2] != q_TNH.shape[::2] or heads % groups:
        raise ValueError(
            f"q {tuple(q_TNH.shape)}, k {tuple(k_TGH.shape)} and v {tuple(v_TGH.shape)} do not fit: "
            "same T and H, query heads a multiple of key heads"
        )
    if q_TNH.dtype not in DTYPES or not q_TNH.dtype == k_TGH.dtype == v_TGH.dtype:
        raise ValueError(
            f"q, k, v must share float16, bfloat16 or float32; got {q_TNH.dtype}, {k_TGH.dtype}, {v_TGH.dtype}"
        )


@cache
@torch.inference_mode(False)  # scoring may come first, and training could not keep its tensor for the backward
def causal_mask(device: torch.device) -> torch.Tensor:
    """bool [2048, 2048], true where masked: above the diagonal."""
    return torch.ones(_MASK_SIZE, _MASK_SIZE, dtype=torch.bool, device=device).triu_(1)
