"""Bytes that one decoder layer holds, counted through this project's own layers on tensors that have no values.

The layer that trains is run forward and backward on fake tensors, with a process group that sends nothing, and every
storage is counted from its making to its end. So what autograd keeps, what recomputation gives up and what tensor
parallelism cuts need no formula, and cannot drift away from the code.

What operators take as workspace while they run is not known for an NPU and not counted.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from npd_ascend.model.decoder import PLAIN, Decoder, Kernels, recomputed
from npd_ascend.model.families import DecoderConfig
from npd_ascend.parallel.mesh import Mesh
from npd_ascend.parallel.plan import cut_model
from npd_ascend.trainer.gradients import GradientSums


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Of one layer of one rank and a whole pack."""

    kept: int  # from the layer's forward to its backward, its output included, its input not
    backward: int  # at most during its backward: kept, what the backward makes, its float32 gradients
    forward: int  # at most during a forward that keeps nothing


@contextmanager
def silent_mesh(tp: int, *, sequence_parallel: bool) -> Iterator[Mesh]:
    """The mesh of tensor-parallel rank 0 whose collectives move nothing."""
    if tp == 1:
        yield Mesh()
        return
    # shapes of collectives, some of which torch 2.10 lacks without it; here, since it takes a while to import
    import torch.distributed._tools.fake_collectives  # noqa: F401

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp)
    try:
        yield Mesh(tp=tp, sequence_parallel=sequence_parallel, tp_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def count_layer(
    config: DecoderConfig,
    dtype: torch.dtype,
    tokens: int,
    mesh: Mesh,
    recompute: str,
    kernels: Kernels = PLAIN,
    device: str = "cpu",
) -> LayerBytes:
    """One layer of `config` on this rank of `mesh`, for a pack of `tokens` tokens in samples of at most 1,024.

    device: on which the operators of `kernels` exist.
    """
    tokens -= tokens % mesh.row_multiple
    cu_seqlens = [*range(0, tokens, 1024), tokens]
    with FakeTensorMode():
        model = _fake_model(
            replace(config, num_layers=1, vocab_size=64 * mesh.tp), dtype, mesh, recompute, kernels, device
        )
        sums = GradientSums(model, mesh)
        rotary = model.rotary(torch.arange(tokens, device=device) % 1024)
        x_TD = torch.randn(tokens // mesh.row_multiple, config.hidden_size, dtype=dtype, device=device).requires_grad_()
        with Live(*model.parameters(), *rotary, x_TD) as live:
            with torch.no_grad():
                model.layers[0](x_TD, rotary, cu_seqlens)
            forward, live.peak = live.peak, 0
            y_TD = recomputed(recompute == "full", model.layers[0], x_TD, rotary, cu_seqlens)
            kept, live.peak = live.bytes, 0
            y_TD.backward(torch.empty_like(y_TD))
    del sums
    return LayerBytes(kept, live.peak, forward)


def _fake_model(config, dtype, mesh, recompute, kernels, device) -> Decoder:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a fake module cannot be converted afterwards
    try:
        with torch.device(device):
            model = Decoder(config, kernels, recompute)
    finally:
        torch.set_default_dtype(default)
    cut_model(model, mesh)
    return model


class Live(TorchDispatchMode):
    """Bytes of the storages that operators made and that are not gone yet, but for those of `given`."""

    def __init__(self, *given: torch.Tensor):
        super().__init__()
        self.bytes = self.peak = 0
        # a storage that is gone may leave its address to another, so addresses are forgotten with it
        self._known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._gone, address, size)

    def _gone(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.bytes -= size
