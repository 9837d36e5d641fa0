"""torch's scaled_dot_product_attention, one call per run of neighbouring samples of equal length.

A call per sample is the fastest form on CPU for long samples, because each call sees only its own
triangle; for packs of hundreds of short samples the calls themselves dominate. Samples of equal
length that lie next to each other are one strided view [B, L, N, H], so they share a call without a
copy. The packer sorts by length, which makes such runs common.
"""

from collections.abc import Sequence
from itertools import groupby, pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention


def unavailable_reason(device: torch.device) -> str | None:
    """Runs on every device torch has; None means available."""
    return None


def packed_attention(q_TNH, k_TGH, v_TGH, cu_seqlens: Sequence[int], scale: float) -> torch.Tensor:
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    runs = [(length, sum(1 for _ in same)) for length, same in groupby(lengths)]
    grouped = q_TNH.shape[1] != k_TGH.shape[1]

    sizes = [length * count for length, count in runs]
    outputs = []
    for (length, count), q, k, v in zip(runs, q_TNH.split(sizes), k_TGH.split(sizes), v_TGH.split(sizes), strict=True):
        q_BNLH, k_BGLH, v_BGLH = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        out_BNLH = scaled_dot_product_attention(q_BNLH, k_BGLH, v_BGLH, is_causal=True, scale=scale, enable_gqa=grouped)
        outputs.append(out_BNLH.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)
