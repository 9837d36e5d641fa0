"""`chunked`, with what each chunk adds to the head's gradient multiplied and added by one operator.

Plain torch rounds that product to bfloat16, writes it, and reads it again to add it to the float32 sum: some fifteen
times for a pack of 32,768 tokens with openPangu's vocabulary. torch_npu's operator adds x^T weight to C in place and
does neither (op-plugin, op_plugin/ops/atb/LinearAtb.cpp). It runs in the library of nnal.
"""

import os
from functools import partial

import torch

from npd_kernels.launch import npu_unavailable

from . import streamed
from .impl_chunked import Rows

DTYPES = (torch.float16, torch.bfloat16)


def unavailable_reason(device: torch.device) -> str | None:
    """None means available."""
    if reason := npu_unavailable(device):
        return reason
    return None if os.environ.get("ATB_HOME_PATH") else "ATB_HOME_PATH is not set; source nnal's set_env.sh"


def add_product(sum_VD: torch.Tensor, d_logits_CV: torch.Tensor, hidden_CD: torch.Tensor) -> None:
    """sum_VD += d_logits_CV^T hidden_CD, in place, accumulated in float32."""
    import torch_npu

    check(sum_VD, d_logits_CV, hidden_CD)
    torch_npu._npu_matmul_add_fp32(d_logits_CV, hidden_CD, sum_VD)


def check(sum_VD: torch.Tensor, d_logits_CV: torch.Tensor, hidden_CD: torch.Tensor) -> None:
    """ValueError for what the operator does not take; it has no checks of its own."""
    if d_logits_CV.dtype not in DTYPES or hidden_CD.dtype != d_logits_CV.dtype or sum_VD.dtype != torch.float32:
        raise ValueError(
            f"products of float16 or bfloat16 are added to float32; got {d_logits_CV.dtype}, {hidden_CD.dtype} and "
            f"{sum_VD.dtype}. Use kernels.loss: chunked"
        )
    (tokens, rows), (also_tokens, size) = d_logits_CV.shape, hidden_CD.shape
    if tokens != also_tokens or sum_VD.shape != (rows, size) or not sum_VD.is_contiguous():
        raise ValueError(
            f"gradients {tuple(d_logits_CV.shape)} and hidden states {tuple(hidden_CD.shape)} do not add to a "
            f"contiguous sum of {tuple(sum_VD.shape)}"
        )


token_loss = partial(streamed.token_loss, Rows, add_product=add_product)
token_logprobs = partial(streamed.token_logprobs, Rows, add_product=add_product)
