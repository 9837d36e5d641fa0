"""The specification: float64, a dense block-diagonal causal mask, no tricks."""

from collections.abc import Sequence

import torch


def unavailable_reason(device: torch.device) -> str | None:
    """The reference runs wherever torch has float64; None means available."""
    return None


def packed_attention(q_TNH, k_TGH, v_TGH, cu_seqlens: Sequence[int], scale: float) -> torch.Tensor:
    """softmax(scale * q k^T + mask) v, token by token; float64 inside, q's dtype outside."""
    num_tokens, num_heads, _ = q_TNH.shape
    repeat = num_heads // k_TGH.shape[1]
    q, k, v = q_TNH.double(), k_TGH.double(), v_TGH.double()
    k_TNH, v_TNH = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)

    lengths = torch.tensor(cu_seqlens).diff()
    sample_T = torch.arange(len(lengths)).repeat_interleave(lengths)
    order_T = torch.arange(num_tokens)
    allowed_TT = (sample_T[:, None] == sample_T[None, :]) & (order_T[:, None] >= order_T[None, :])

    scores_NTT = torch.einsum("tnh,snh->nts", q, k_TNH) * scale
    scores_NTT = scores_NTT.masked_fill(~allowed_TT.to(q.device), float("-inf"))
    return torch.einsum("nts,snh->tnh", scores_NTT.softmax(-1), v_TNH).to(q_TNH.dtype)
