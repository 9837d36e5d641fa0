"""The planner against what torch_npu's autograd keeps on fake NPU tensors: a layer's bytes, and a whole step's."""

import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from tracing import PANGU_1B, planned_step, traced_step

from npd_ascend.config import KernelConfig
from npd_ascend.model.decoder import PLAIN, Kernels
from npd_ascend.parallel.mesh import ALONE, Mesh
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


@pytest.mark.parametrize(("tp", "recompute"), [(1, "off"), (1, "full"), (2, "selective")])
def test_a_whole_step_takes_what_was_planned(tp, recompute):
    config, pack = replace(PANGU_1B, num_layers=8), [1024] * 8
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp)
    mesh = Mesh(tp=tp, sequence_parallel=tp > 1, tp_group=dist.group.WORLD if tp > 1 else None)
    _, peak, batch = traced_step(config, pack, recompute, mesh)
    dist.destroy_process_group()  # the planner has a silent one of its own
    assert peak == pytest.approx(planned_step(config, pack, recompute, tp, batch), rel=0.01)


def test_a_layer_cut_over_ranks_is_counted_by_this_torch():
    """As `npd plan` does it, in a process in which nothing else has told torch the shapes of collectives."""
    code = f"""
import torch
from npd_ascend.model.families import DecoderConfig
from npd_ascend.planner.layer import count_layer, silent_mesh

with silent_mesh(2, sequence_parallel=True) as mesh:
    count_layer(DecoderConfig(**{asdict(replace(PANGU_1B, num_layers=1))}), torch.bfloat16, 512, mesh, "off")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
