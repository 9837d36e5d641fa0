"""A training step on fake NPU tensors: shapes, dtypes and autograd are torch_npu's own, values there are none."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from npd_ascend.model.decoder import Decoder, Kernels
from npd_ascend.model.families import DecoderConfig
from npd_ascend.packing import lay_out
from npd_ascend.parallel.mesh import ALONE, Mesh
from npd_ascend.parallel.plan import cut_model
from npd_ascend.trainer.objectives import Batch, Objective
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


class Watch(TorchDispatchMode):
    """Counts the operators that are dispatched, and the places where the host would wait for the device."""

    def __init__(self):
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.waits: list[str] = []
        self.fused_calls: list[tuple[str, dict]] = []  # torch_npu's own operators with their arguments by name

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        self.operators[name] += 1
        if name.startswith("npu::"):
            names = [argument.name for argument in func._schema.arguments]
            self.fused_calls.append((name.removeprefix("npu::"), {**dict(zip(names, args, strict=False)), **kwargs}))
        if name == "aten::_local_scalar_dense":  # item(), tolist(), float(), bool()
            self.waits.append(name)
            return 1.0
        out = func(*args, **kwargs)
        # in either direction torch_npu waits for the stream first (aclrtSynchronizeStream in its CopyKernelOpApi.cpp)
        if name in ("aten::_to_copy", "aten::copy_") and not kwargs.get("non_blocking"):
            kinds = {x.device.type for x in (*args, out) if isinstance(x, torch.Tensor)}
            self.waits += [name] * (len(kinds) > 1)
        return out


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


def fake_batch(sample_lens: list[int], top_k: int, mesh: Mesh = ALONE) -> Batch:
    """A pack whose samples are one third prompt, with the targets of NPD."""
    layout = lay_out([([1] * length, max(1, length // 3)) for length in sample_lens], NPU, mesh.row_multiple)
    answer_tokens = len(layout.answer_ids_A)
    return Batch(
        layout,
        torch.ones(answer_tokens, top_k + 1, dtype=torch.int64, device=NPU),
        torch.ones(answer_tokens, top_k, device=NPU),
        torch.ones(answer_tokens, device=NPU),
    )


def objective(loss_impl: str = "chunked") -> Objective:
    return Objective(lambda_=0.9, loss_impl=loss_impl)
