"""Gradients of a step: float32 sums over micro-batches, then over ranks.

A parameter of two dimensions whose rows divide over the data-parallel ranks is cut: rank d ends with the sum of its
rows d/dp to (d+1)/dp only (reduce-scatter, started in the backward of the last micro-batch as soon as the gradient is
there). The others (norms, biases: less than a thousandth of a model) are summed whole on every rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from npd_ascend.model.decoder import Decoder
from npd_ascend.parallel.mesh import Mesh, gather_rows, reduce_scatter_rows, sum_over


class GradientSums:
    def __init__(self, model: Decoder, mesh: Mesh):
        self._model, self._mesh = model, mesh
        self._params = dict(model.named_parameters())
        self._sums: dict[str, torch.Tensor] = {}
        self._cut = [name for name, p in self._params.items() if p.dim() == 2 and len(p) % mesh.dp == 0]
        # The order in which all ranks start their reductions, roughly that of the backward. Ranks whose gradients
        # come in another order, or that have none at all, must not differ.
        self._order = [name for name in reversed(self._cut) if not self._has_copies(name)] if mesh.dp > 1 else []
        self._ready: set[str] = set()
        self._in_flight: dict[str, tuple] = {}
        self._last = False
        for name, param in self._params.items():
            param.register_post_accumulate_grad_hook(partial(self._add, name))

    def rows(self, name: str) -> slice:
        """The rows of a parameter whose summed gradient this rank ends with."""
        if name not in self._cut:
            return slice(0, len(self._params[name]))
        n = len(self._params[name]) // self._mesh.dp
        return slice(self._mesh.dp_rank * n, (self._mesh.dp_rank + 1) * n)

    def is_cut(self, name: str) -> bool:
        return name in self._cut

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """The backward in here completes this rank's sums, so that they may leave while it runs."""
        self._last = True
        yield
        self._last = False

    def take(self) -> dict[str, torch.Tensor]:
        """Gradient sums over all ranks, float32, of this rank's rows; zero where no rank had any. Clears them."""
        for name, param in self._params.items():
            if name not in self._sums:  # a rank without samples still joins every collective
                self._sums[name] = torch.zeros_like(param, dtype=torch.float32)
        self._sum_partial()
        for name in self._params:
            if self._has_copies(name):
                self._sum_copies(name)
        result = {}
        if self._mesh.dp > 1:
            self._ready.update(self._order)
            self._start_ready()
            for name in self._cut:
                if name not in self._order:
                    self._in_flight[name] = reduce_scatter_rows(self._sums[name], self._mesh.dp_group, async_op=True)
            self._sum_flat([name for name in self._params if name not in self._cut], self._mesh.dp_group)
            for name, (rows, handle) in self._in_flight.items():
                handle.wait()
                result[name] = rows
        grads = {name: result.get(name, self._sums[name]) for name in self._params}
        self._sums, self._in_flight = {}, {}
        self._ready.clear()
        return grads

    def _add(self, name: str, param: torch.Tensor) -> None:
        grad, param.grad = param.grad, None
        if name in self._sums:
            self._sums[name] += grad
        else:
            self._sums[name] = grad.float()
        if self._last:
            self._ready.add(name)
            self._start_ready()

    def _start_ready(self) -> None:
        for name in self._order[len(self._in_flight) :]:
            if name not in self._ready:
                return
            self._in_flight[name] = reduce_scatter_rows(self._sums[name], self._mesh.dp_group, async_op=True)

    def _sum_partial(self) -> None:
        self._sum_flat(sorted(self._model.partial_gradients), self._mesh.tp_group)

    def _sum_flat(self, names: list[str], group) -> None:
        """All-reduce several small gradients as one."""
        if not names or group is None:
            return
        flat = sum_over(torch.cat([self._sums[name].flatten() for name in names]), group)
        for name, part in zip(names, flat.split([self._sums[name].numel() for name in names]), strict=True):
            self._sums[name] = part.view_as(self._sums[name])

    def _has_copies(self, name: str) -> bool:
        return self._model.kv_copies > 1 and ".qkv." in name

    def _sum_copies(self, name: str) -> None:
        """A key or value head that several slots hold gives each of them the sum of what all got."""
        attention: Any = self._model.get_submodule(name.rpartition(".qkv.")[0])
        queries, slots, _ = (size // attention.head_dim for size in attention.split_sizes)
        own = self._sums[name][queries * attention.head_dim :]
        every = gather_rows(own, self._mesh.tp_group)[0]
        every = every.view(self._mesh.tp, 2, slots, -1).transpose(0, 1)  # key and value, all slots in order
        heads = every.reshape(2, -1, self._model.kv_copies, every.shape[-1]).sum(2, keepdim=True)
        summed = heads.expand(-1, -1, self._model.kv_copies, -1).reshape(2, self._mesh.tp, slots, -1)
        own.copy_(summed[:, self._mesh.tp_rank].reshape(own.shape))
