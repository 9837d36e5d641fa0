"""HCCL's name for gloo on the memory of the stand-in: every collective that a trainer asks of its cards.

A group connects at its first collective, and as HCCL refuses to while another one is at work: after its second.
"""

from typing import ClassVar

import torch
import torch.distributed as dist


class Hccl(dist.ProcessGroup):
    _collectives: ClassVar[dict["Hccl", int]] = {}  # of each group of this process that has connected

    def __init__(self, options, as_host):
        super().__init__(options.group_rank, options.group_size)
        self._gloo = dist.ProcessGroupGloo(
            options.store, options.group_rank, options.group_size, timeout=options.timeout
        )
        self._as_host = as_host

    def shutdown(self):
        """gloo's threads end here: one that still drops a tensor while the interpreter goes would abort the process."""
        self._gloo = None
        self._collectives.pop(self, None)

    def _at_work(self) -> dist.ProcessGroupGloo:
        if self not in self._collectives and any(count > 1 for count in self._collectives.values()):
            raise RuntimeError("hcclCommInitRootInfoConfig, error code 7: another group is at work")
        self._collectives[self] = self._collectives.get(self, 0) + 1
        return self._gloo

    def _seen_by_gloo(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "npu":
            raise RuntimeError(f"hccl was given a tensor of {tensor.device}")
        return self._as_host(tensor)

    def allreduce(self, tensors, options):
        return self._at_work().allreduce([self._seen_by_gloo(tensor) for tensor in tensors], options)

    def all_gather_single(self, whole, rows, options):
        return self._at_work()._allgather_base(self._seen_by_gloo(whole), self._seen_by_gloo(rows), options)

    def reduce_scatter_single(self, rows, whole, options):
        return self._at_work()._reduce_scatter_base(self._seen_by_gloo(rows), self._seen_by_gloo(whole), options)

    def allgather(self, parts, tensors, options):
        seen = [[self._seen_by_gloo(part) for part in of_one] for of_one in parts]
        return self._at_work().allgather(seen, [self._seen_by_gloo(tensor) for tensor in tensors], options)
