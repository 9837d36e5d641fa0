"""Weights from the trainer's device to the workers', over the communicators that vLLM's own engines for devices have.

Those engines ("nccl"; "hccl" in vllm-ascend) take broadcasts of packed tensors and load each into the model before the
next comes. The tensors of a Snapshot lie back to back, so a packed bucket is a slice of it and nothing is packed. NOT
run on a device so far; what has been shown without one: docs/weights.md.
"""

import math
import socket
import time
from dataclasses import dataclass

import torch

from npd_ascend.device import device_communicator
from npd_ascend.weights.collective import Snapshot
from npd_ascend.weights.control import Line, TransferError

DEVICE_BUCKET_BYTES = 1 << 28  # a worker holds two at a time, each up to its largest tensor larger
_POLL_S = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceGroupInfo:
    """What the ranks of a worker need to join their trainer, who is rank 0."""

    host: str
    port: int
    world_size: int
    bucket_bytes: int  # of which both sides make the same cuts; see packed_sizes


class DeviceGroup:
    """The trainer's end, for one worker, in the thread that makes it.

    server: listens where `info` says. RuntimeError if a rank does not come within timeout_s, or the library that the
    communicator loads is not there.
    """

    def __init__(self, server: socket.socket, info: DeviceGroupInfo, device: torch.device, timeout_s: float):
        from vllm.distributed.utils import StatelessProcessGroup

        self._timeout_s, module = timeout_s, torch.get_device_module(device)
        if device.index is not None:
            module.set_device(device)  # of this thread
        self._stream = module.Stream()  # no collective of a training step waits behind a worker
        meeting = StatelessProcessGroup.create(
            info.host, info.port, 0, info.world_size, store_timeout=math.ceil(timeout_s), listen_socket=server
        )
        try:
            with module.stream(self._stream):
                self._communicator = device_communicator(device)(meeting, device)
            if self._communicator.disabled:  # it would move nothing and say nothing
                raise RuntimeError("vLLM's communicator did not find its library")
        finally:
            # closes the port, at which whoever connects is answered; a worker that still waits there for a trainer
            # that has failed would do so for five minutes
            meeting.store = None

    def send(self, snapshot: Snapshot, line: Line) -> None:
        """TransferError if a bucket is not away within timeout_s, or the worker hangs up.

        What is on its way is on its way until `close`: these communicators have no time-out of their own.
        """
        for bucket in snapshot.buckets:
            self._communicator.broadcast(bucket, src=0, stream=self._stream)
            deadline = time.monotonic() + self._timeout_s
            while not self._stream.query():
                if not line.is_open():
                    raise TransferError(f"{line.peer}: hung up in the middle of version {snapshot.version}")
                if time.monotonic() > deadline:
                    raise TransferError(
                        f"{line.peer}: did not take its part of version {snapshot.version} within {self._timeout_s:g} s"
                    )
                time.sleep(_POLL_S)

    def close(self) -> None:
        """Ends what is still on its way, where the communicator can: vllm-ascend's cannot, and waits for HCCL."""
        if hasattr(self._communicator, "destroy"):
            self._communicator.destroy()
