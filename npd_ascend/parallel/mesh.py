"""The ranks of the trainer: TP x DP, tensor-parallel neighbours next to each other.

Rank r is tensor-parallel rank r % tp of data-parallel replica r // tp, so that the ranks that talk most share a host.
Every collective has the configured time-out: a rank that died or hangs stops the others.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from npd_ascend.device import collective_backend
from npd_ascend.errors import LostRankError, UserError
from npd_ascend.ranks import Rank, this_rank

_log = logging.getLogger(__name__)
# torch 2.13 renamed both; the Ascend row of versions has torch 2.10
_gather_into = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter_into = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """This rank's place, and the groups it is in; a group of one rank is None."""

    tp: int = 1
    dp: int = 1
    rank: int = 0
    sequence_parallel: bool = False
    tp_group: dist.ProcessGroup | None = None
    dp_group: dist.ProcessGroup | None = None
    # all ranks, CPU tensors
    host_group: dist.ProcessGroup | None = None
    checkpoint_group: dist.ProcessGroup | None = None  # the same for the thread that writes checkpoints

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp

    @property
    def size(self) -> int:
        return self.tp * self.dp

    @property
    def row_multiple(self) -> int:
        """What the tokens of a pack must be a multiple of."""
        return self.tp if self.sequence_parallel else 1

    def barrier(self) -> None:
        if self.host_group:
            dist.barrier(self.host_group)

    def from_first(self, value: Any) -> Any:
        """The value that rank 0 has."""
        if self.host_group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.host_group, group_src=0)
        return box[0]

    def sum_over_dp(self, values: torch.Tensor) -> torch.Tensor:
        return sum_over(values, self.dp_group)

    def norm_over_all(self, norm: torch.Tensor) -> torch.Tensor:
        """L2 norm of what all ranks hold together; norm: 0-dim, of what this rank holds."""
        if self.size == 1:
            return norm
        return sum_over(sum_over(norm.square(), self.tp_group), self.dp_group).sqrt()


ALONE = Mesh()


@contextmanager
def open_mesh(tp: int, dp: int, *, sequence_parallel: bool, device: torch.device, timeout_s: int) -> Iterator[Mesh]:
    """Join the other ranks; UserError if this process is not one of tp x dp, or if another rank is lost later."""
    here = this_rank()
    if here.world_size != tp * dp:
        raise UserError(
            f"parallel.tp={tp} x parallel.dp={dp} wants {tp * dp} processes but this is one of {here.world_size}; "
            f"start them with `npd`, or with torchrun --nproc-per-node {tp * dp}"
        )
    if here.world_size == 1:
        yield ALONE
        return
    timeout = timedelta(seconds=timeout_s)
    backend = collective_backend(device)
    with _lost_rank_is_said(here, timeout_s, backend):
        dist.init_process_group(
            backend,
            **_meeting_place(here, timeout),
            rank=here.rank,
            world_size=here.world_size,
            timeout=timeout,
        )
        try:
            mesh = make_mesh(tp, dp, here.rank, sequence_parallel=sequence_parallel, timeout=timeout)
            _warm_up(mesh, device)
            yield mesh
            # on the host: the group of all ranks, never used, then takes no buffers of a card
            mesh.barrier()
        finally:
            dist.destroy_process_group()


def _meeting_place(here: Rank, timeout: timedelta) -> dict[str, Any]:
    """Of init_process_group. A store outlives the ranks, so every meeting has names of its own in it."""
    url = urlsplit(here.rendezvous)
    if url.scheme != "store":
        return {"init_method": here.rendezvous}
    store = dist.TCPStore(url.hostname, url.port, is_master=False, timeout=timeout)
    return {"store": dist.PrefixStore(f"meeting{url.path}", store)}


def make_mesh(tp: int, dp: int, rank: int, *, sequence_parallel: bool, timeout: timedelta) -> Mesh:
    """Groups over the first tp x dp ranks of the running process group; called by all of its ranks, in one order."""
    mine = Mesh(tp=tp, dp=dp, rank=rank, sequence_parallel=sequence_parallel)
    tp_groups = [dist.new_group([d * tp + t for t in range(tp)], timeout=timeout) for d in range(dp)]
    dp_groups = [dist.new_group([d * tp + t for d in range(dp)], timeout=timeout) for t in range(tp)]
    host_group, checkpoint_group = (
        dist.new_group(list(range(tp * dp)), timeout=timeout, backend="gloo") for _ in range(2)
    )
    if rank >= tp * dp:
        return mine
    return Mesh(
        tp=tp,
        dp=dp,
        rank=rank,
        sequence_parallel=sequence_parallel and tp > 1,
        tp_group=tp_groups[mine.dp_rank] if tp > 1 else None,
        dp_group=dp_groups[mine.tp_rank] if dp > 1 else None,
        host_group=host_group if tp * dp > 1 else None,
        checkpoint_group=checkpoint_group if tp * dp > 1 else None,
    )


def _warm_up(mesh: Mesh, device: torch.device) -> None:
    """Groups connect at their first collective, which fails on an NPU while other groups are already at work."""
    for group in (mesh.tp_group, mesh.dp_group):
        sum_over(torch.zeros(1, device=device), group)


def sum_over(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """All-reduce in place; returns `values`."""
    if group:
        dist.all_reduce(values, group=group)
    return values


def gather_rows(rows: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False, out: torch.Tensor | None = None):
    """[n, ...] of every rank, one after the other: ([ranks * n, ...], handle or None). out: where to, if not new."""
    if out is None:
        out = rows.new_empty(rows.shape[0] * dist.get_world_size(group), *rows.shape[1:])
    return out, _gather_into(out, rows.contiguous(), group=group, async_op=async_op)


def reduce_scatter_rows(whole: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False):
    """The sum over ranks of [ranks * n, ...], of which rank r gets its n rows: ([n, ...], handle or None)."""
    rows = whole.new_empty(whole.shape[0] // dist.get_world_size(group), *whole.shape[1:])
    return rows, _reduce_scatter_into(rows, whole.contiguous(), group=group, async_op=async_op)


@contextmanager
def _lost_rank_is_said(here: Rank, timeout_s: int, backend: str) -> Iterator[None]:
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        # backends raise plain RuntimeErrors; these words are in all of gloo's, which the host's group always is
        words = (backend, "gloo", "connection", "timed out", "timeout", "socket")
        if not any(word in str(error).lower() for word in words):
            raise
        _log.debug("collective failed", exc_info=error)
        raise LostRankError(
            f"rank {here.rank} of {here.world_size} lost another rank or waited {timeout_s} s (parallel.timeout_s) for "
            f"it ({str(error).splitlines()[0][:120]}); the same command goes on from the last checkpoint"
        ) from error
