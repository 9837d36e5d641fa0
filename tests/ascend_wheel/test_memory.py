"""The planner's stand-ins for fused operators against what torch_npu's autograd keeps, on fake NPU tensors."""

import pytest
import torch
from tracing import PANGU_1B

from npd_ascend.config import KernelConfig
from npd_ascend.model.decoder import PLAIN, Kernels
from npd_ascend.parallel.mesh import ALONE
from npd_ascend.planner.fused import countable
from npd_ascend.planner.layer import LayerBytes, count_layer
from npd_kernels.packed_attention import impl_npu

TOKENS = 4096


@pytest.mark.parametrize("recompute", ["off", "selective", "full"])
def test_the_stand_ins_keep_what_torch_npu_keeps(recompute):
    impl_npu.causal_mask.cache_clear()
    real = count_layer(PANGU_1B, torch.bfloat16, TOKENS, ALONE, recompute, Kernels("npu", "npu"), "npu:0")
    impl_npu.causal_mask.cache_clear()
    with countable(KernelConfig(attention="npu", layer="npu")) as kernels:
        planned = count_layer(PANGU_1B, torch.bfloat16, TOKENS, ALONE, recompute, kernels)
    mask = 2048 * 2048  # one for all layers, made by the first that asks
    assert planned == LayerBytes(real.kept - mask, real.backward - mask, real.forward - mask)
    if recompute != "full":  # a planted mistake: plain operators keep more
        plain = count_layer(PANGU_1B, torch.bfloat16, TOKENS, ALONE, recompute, PLAIN)
        assert plain.kept > 1.3 * planned.kept
