"""A training step on fake NPU tensors: shapes, dtypes and autograd are torch_npu's own, values there are none."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed._tools.fake_collectives  # shapes of collectives, some of which torch 2.10 lacks without it
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from npd_ascend.config import KernelConfig, OptimizerConfig
from npd_ascend.model.decoder import Decoder, Kernels
from npd_ascend.model.families import DecoderConfig
from npd_ascend.parallel.mesh import ALONE, Mesh
from npd_ascend.parallel.plan import cut_model
from npd_ascend.planner.fused import countable
from npd_ascend.planner.layer import Live
from npd_ascend.planner.memory import Layout, trainer_memory
from npd_ascend.records import Sample
from npd_ascend.trainer.objectives import Batch, Objective, make_batch
from npd_ascend.trainer.optimizer import MasterAdamW
from npd_ascend.trainer.step import train_step
from npd_kernels.packed_attention import impl_npu

NPU = torch.device("npu:0")
PANGU_1B = DecoderConfig(
    vocab_size=153376,
    hidden_size=1536,
    intermediate_size=6144,
    num_layers=26,
    num_heads=12,
    num_kv_heads=6,
    head_dim=128,
    max_position=32768,
    rope_theta=4e6,
    rms_norm_eps=1e-5,
    qkv_bias=True,
    o_bias=True,
    qk_norm=False,
    tie_embeddings=True,
    init_std=0.02,
)


class Like(NamedTuple):
    """What is kept of a tensor that was given to an operator: the tensor would not be freed when the step does."""

    shape: torch.Size
    dtype: torch.dtype


class Watch(TorchDispatchMode):
    """Counts the operators that are dispatched, and the places where the host would wait for the device."""

    def __init__(self):
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.waits: list[str] = []
        self.fused_calls: list[tuple[str, dict]] = []  # torch_npu's own operators with their arguments by name
        self._page_locked: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        self.operators[name] += 1
        if name.startswith("npu::"):
            names = [argument.name for argument in func._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            given = tree_map_only(torch.Tensor, lambda x: Like(x.shape, x.dtype), given)
            self.fused_calls.append((name.removeprefix("npu::"), given))
        if name == "aten::_local_scalar_dense":  # item(), tolist(), float(), bool()
            self.waits.append(name)
            return 1.0
        if name == "aten::_pin_memory":  # fake tensors have none
            self._page_locked.append(args[0].clone())
            return self._page_locked[-1]
        out = func(*args, **kwargs)
        if name in ("aten::_to_copy", "aten::copy_"):
            tensors = [x for x in (*args, out) if isinstance(x, torch.Tensor)]
            crosses = len({x.device.type for x in tensors}) > 1
            self.waits += [name] * (crosses and not (kwargs.get("non_blocking") and self._is_page_locked(tensors)))
        return out

    def _is_page_locked(self, tensors: list[torch.Tensor]) -> bool:
        """Else torch_npu waits for the stream, in either direction and whatever was asked for (aclrtSynchronizeStream
        in its CopyKernelOpApi.cpp and CachingHostAllocator.cpp)."""
        return any(x is locked for x in tensors for locked in self._page_locked)


@contextmanager
def tracing() -> Iterator[Watch]:
    """Inside, tensors are fake; a read of a value on the host is counted and gives 1."""
    impl_npu.causal_mask.cache_clear()
    with FakeTensorMode(), Watch() as watch:
        yield watch
    impl_npu.causal_mask.cache_clear()


def fake_decoder(config: DecoderConfig, recompute: str = "off", mesh: Mesh = ALONE) -> Decoder:
    """This rank's bfloat16 part with every implementation that is torch_npu's."""
    torch.set_default_dtype(torch.bfloat16)  # a fake module cannot be converted afterwards
    with NPU:
        model = Decoder(config, Kernels("npu", "npu"), recompute)
    torch.set_default_dtype(torch.float32)
    cut_model(model, mesh)
    return model


def fake_batch(sample_lens: list[int], top_k: int, mesh: Mesh = ALONE, of: Objective | None = None) -> Batch:
    """A pack whose samples are one third prompt, with the targets of `of`, or of NPD."""
    samples = [
        Sample(
            sample_id=str(at),
            token_ids=(1,) * length,
            prompt_len=max(1, length // 3),
            teacher_topk_ids=np.ones((length - max(1, length // 3), top_k), np.int32),
            teacher_topk_logprobs=np.zeros((length - max(1, length // 3), top_k), np.float32),
            advantage=1.0,
            generator_logprobs=np.zeros(length - max(1, length // 3), np.float32),
        )
        for at, length in enumerate(sample_lens)
    ]
    return make_batch(samples, of or objective(), NPU, mesh.row_multiple)


def traced_step(config: DecoderConfig, pack: list[int], recompute: str, mesh: Mesh) -> tuple[Watch, int, Batch]:
    """(what was seen of a training step, the most bytes that were there during it, its batch)."""
    with tracing() as watch, Live() as live:
        model = fake_decoder(config, recompute, mesh)
        optimizer = MasterAdamW(model, OptimizerConfig(), mesh)
        watch.waits.clear()
        watch.operators.clear()
        batch = fake_batch(pack, 10, mesh)
        live.peak = live.bytes
        train_step(model, [batch], optimizer, objective(), weight_sum=1.0, lr=1e-5, mesh=mesh)
    return watch, live.peak, batch


def planned_step(config: DecoderConfig, pack: list[int], recompute: str, tp: int, batch: Batch) -> int:
    """Bytes that the planner counts for the same step, without buffers of HCCL."""
    layout = Layout(tp=tp, dp=1, sequence_parallel=tp > 1, recompute=recompute, pack_tokens=sum(pack))
    answers = len(batch.layout.answer_ids_A)
    with countable(KernelConfig(attention="npu", layer="npu")) as kernels:
        return trainer_memory(
            "distill", config, layout, torch.bfloat16, device="npu", answer_tokens=answers, kernels=kernels
        ).step


def objective(loss_impl: str = "chunked") -> Objective:
    return Objective(lambda_=0.9, loss_impl=loss_impl)
