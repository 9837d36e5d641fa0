"""What the operators of torch_npu that npd_kernels calls compute, in plain torch."""

import itertools

import torch
from torch.nn.functional import scaled_dot_product_attention, silu


def npu_rms_norm(x, gamma, epsilon=1e-6):
    rstd = (x.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (x.float() * rstd).to(x.dtype) * gamma, rstd


def npu_rotary_mul(x, r1, r2, mode="half"):
    assert mode == "half"
    left, right = x.chunk(2, -1)
    return x * r1 + torch.cat((-right, left), -1) * r2


def npu_swiglu(x, *, dim=-1):
    gate, up = x.chunk(2, dim)
    return silu(gate) * up


def npu_fusion_attention(
    query, key, value, head_num, input_layout, *, atten_mask, scale, keep_prob, sparse_mode, **lengths
):
    """TND with the compressed causal mask: sample by sample."""
    assert (input_layout, keep_prob, sparse_mode) == ("TND", 1.0, 3), "another form than the one that is in use"
    assert head_num == query.shape[1]
    assert atten_mask.shape == (2048, 2048)
    assert lengths["actual_seq_qlen"] == lengths["actual_seq_kvlen"]
    parts = []
    for start, end in itertools.pairwise([0, *lengths["actual_seq_qlen"]]):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        part = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        parts.append(part[0].transpose(0, 1))
    return (torch.cat(parts),)


def _npu_matmul_add_fp32(x, weight, sum_):
    sum_.add_(x.float().T @ weight.float())
