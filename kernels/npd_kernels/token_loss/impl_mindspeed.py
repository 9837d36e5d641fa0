"""`npu` with MindSpeed's operator in the place of torch_npu's: the same formula, compiled on the machine at first use.

Source: Ascend/MindSpeed, branch core_r0.16.0 (e477249), mindspeed/ops/npu_matmul_add.py. Importing it brings torch_npu,
torchair and the builders of MindSpeed's other operators, and patches nothing; Megatron is not wanted.
"""

import importlib.util
import os
import shutil
from functools import partial

import torch

from . import impl_npu, streamed
from .impl_chunked import Rows


def unavailable_reason(device: torch.device) -> str | None:
    """None means available."""
    if reason := impl_npu.unavailable_reason(device):
        return reason
    if importlib.util.find_spec("mindspeed") is None:
        return "the mindspeed package is not installed; docs/ascend.md says how"
    if not os.environ.get("ASCEND_HOME_PATH"):
        return "ASCEND_HOME_PATH is not set, whose headers its operator is compiled with; . launch/env_ascend.sh"
    if missing := [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]:
        return f"its operator is compiled on this machine, and {missing[0]} is not on the PATH"
    return None


def add_product(sum_VD: torch.Tensor, d_logits_CV: torch.Tensor, hidden_CD: torch.Tensor) -> None:
    """sum_VD += d_logits_CV^T hidden_CD, in place, accumulated in float32."""
    from mindspeed.ops.npu_matmul_add import npu_matmul_add_fp32

    impl_npu.check(sum_VD, d_logits_CV, hidden_CD)
    npu_matmul_add_fp32(total_input=hidden_CD, grad_output=d_logits_CV, grad=sum_VD)


token_loss = partial(streamed.token_loss, Rows, add_product=add_product)
token_logprobs = partial(streamed.token_logprobs, Rows, add_product=add_product)
