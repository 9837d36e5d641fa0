"""Weights from the trainer's memory into that of a generator: one flat buffer, broadcast in checked buckets.

The bytes pass through host memory over gloo on every device. The trainer keeps a copy there, so it trains on while
workers take their time, and its serving threads never meet the collectives of a training step; vLLM's weight loaders
copy from host to device as they do from a file. device_group.py sends the same snapshot between devices instead.
"""

import hashlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from npd_ascend.model.decoder import Decoder
from npd_ascend.model.hf_weights import hf_shapes
from npd_ascend.parallel.mesh import Mesh
from npd_ascend.weights.control import TransferError
from npd_ascend.weights.gather import whole_tensors

MEETINGS = "meetings"  # folder of RUN/weights
_PART_WORDS = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupInfo:
    """What the ranks of a worker need to join their trainer, who is rank 0."""

    meeting: str  # the file in which the ranks tell each other where they listen
    own_host: str  # at which address this worker's ranks do
    world_size: int
    timeout_s: float  # of every collective


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What comes: tensors of one dtype back to back in one buffer, which is cut into buckets."""

    version: int
    dtype: str  # torch's name of it
    names: list[str]  # Hugging Face's
    shapes: list[list[int]]
    bucket_sizes: list[int]  # bytes
    checksums: list[str]  # SHA-256 of every bucket; between devices device_checksum of every tensor
    gather_s: float  # that the trainer took to collect them

    @property
    def numels(self) -> list[int]:
        return [torch.Size(shape).numel() for shape in self.shapes]

    @property
    def total_bytes(self) -> int:
        return sum(self.numels) * getattr(torch, self.dtype).itemsize

    def views(self, buffer: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """(name, tensor) of each, in `buffer` (uint8, total_bytes)."""
        parts = buffer.view(getattr(torch, self.dtype)).split(self.numels)
        return [(name, part.view(shape)) for name, shape, part in zip(self.names, self.shapes, parts, strict=True)]


class Snapshot:
    """One version apart from the model that trains on. Made on rank 0, while the other ranks of its replica exhaust
    whole_tensors.

    device: where it lies; None: in host memory.
    """

    def __init__(
        self,
        version: int,
        model: Decoder,
        mesh: Mesh,
        dtype: torch.dtype,
        bucket_bytes: int,
        device: torch.device | None = None,
    ):
        started, at = time.perf_counter(), 0
        self.version, self._dtype, self._bucket_bytes, self._device = version, dtype, bucket_bytes, device
        self._names: list[str] = []
        self._shapes: list[list[int]] = []
        numel = sum(torch.Size(shape).numel() for shape in hf_shapes(model).values())
        self._values = torch.empty(numel, dtype=dtype, device=device or torch.device("cpu"))
        for name, tensor in whole_tensors(model, mesh):
            self._values[at : at + tensor.numel()].copy_(tensor.reshape(-1))  # to the place and to its dtype in one
            self._names.append(name)
            self._shapes.append(list(tensor.shape))
            at += tensor.numel()
        if device:
            torch.get_device_module(device).synchronize()  # other threads send it, on streams of their own
        self.gather_s = time.perf_counter() - started
        self._checksums: list[str] = []
        self._lock = threading.Lock()

    @property
    def bucket_sizes(self) -> list[int]:
        """Bytes; equal ones in host memory, whole tensors between devices."""
        sizes = [torch.Size(shape).numel() * self._dtype.itemsize for shape in self._shapes]
        if self._device:
            return packed_sizes(sizes, self._bucket_bytes)
        whole, rest = divmod(sum(sizes), self._bucket_bytes)
        return [self._bucket_bytes] * whole + [rest] * (rest > 0)

    @property
    def buckets(self) -> tuple[torch.Tensor, ...]:
        return self._values.view(torch.uint8).split(self.bucket_sizes)

    def manifest(self) -> Manifest:
        """The checksums are made by whoever asks first; the trainer waits for the copy alone."""
        with self._lock:
            if not self._checksums:
                in_host_memory = self._device is None
                self._checksums = list(map(checksum, self.buckets)) if in_host_memory else self._device_checksums()
        return Manifest(
            version=self.version,
            dtype=str(self._dtype).removeprefix("torch."),
            names=self._names,
            shapes=self._shapes,
            bucket_sizes=self.bucket_sizes,
            checksums=self._checksums,
            gather_s=self.gather_s,
        )

    def _device_checksums(self) -> list[str]:
        """On a stream of their own, apart from the training step that goes on meanwhile."""
        module = torch.get_device_module(self._device)
        if self._device.index is not None:
            module.set_device(self._device)  # of this thread
        tensors = self._values.split([torch.Size(shape).numel() for shape in self._shapes])
        with module.stream(module.Stream()):
            return [device_checksum(sums) for sums in list(map(tensor_sums, tensors))]

    def send(self, group: dist.ProcessGroupGloo) -> None:
        for bucket in self.buckets:
            broadcast(bucket, group).wait()


def receive_buckets(manifest: Manifest, group: dist.ProcessGroupGloo) -> torch.Tensor:
    """All bytes of a version, uint8, each bucket compared with its checksum; TransferError names the one that differs.

    RuntimeError, gloo's, if the trainer is lost or silent for the group's time-out.
    """
    buffer = torch.empty(manifest.total_bytes, dtype=torch.uint8)
    buckets = buffer.split(manifest.bucket_sizes)
    arriving = [broadcast(bucket, group) for bucket in buckets]  # one is checked while the next is on its way
    differing = []
    for number, (work, bucket, wanted) in enumerate(zip(arriving, buckets, manifest.checksums, strict=True)):
        work.wait()
        if checksum(bucket) != wanted:
            differing.append(number)
    if differing:  # said after the last one, so that the trainer is not left in the middle of a broadcast
        raise TransferError(
            f"weight version {manifest.version}: bucket {differing[0]} of {len(manifest.checksums)} differs from its "
            f"checksum ({len(differing)} in all)"
        )
    return buffer


def open_group(info: GroupInfo, rank: int) -> dist.ProcessGroupGloo:
    """A gloo group beside whatever groups this process has; its sockets are bound to info.own_host alone.

    RuntimeError if a rank does not come within info.timeout_s.
    """
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=info.timeout_s)
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=info.own_host)]
    # a file, not a server of torch's: that listens at every address, and answers whoever connects
    store = dist.FileStore(info.meeting, info.world_size)
    store.set_timeout(options._timeout)
    return dist.ProcessGroupGloo(store, rank, info.world_size, options)


def packed_sizes(sizes: Sequence[int], bucket_bytes: int) -> list[int]:
    """Bytes of the broadcasts in which vLLM's engines for devices take tensors of these `sizes` (bytes).

    A bucket ends with the tensor that makes it larger than bucket_bytes. Source: docs/ascend.md.
    """
    packed, current = [], 0
    for size in sizes:
        current += size
        if current > bucket_bytes:
            packed.append(current)
            current = 0
    return packed + [current] * (current > 0)


def checksum(bucket: torch.Tensor) -> str:
    return hashlib.sha256(bucket.numpy().data).hexdigest()


def tensor_sums(tensor: torch.Tensor) -> torch.Tensor:
    """int64, on the tensor's device: of every part of it the sum of its 16-bit words times their places.

    A bit that changes changes a sum, and so do two words or tensors that change places. No sum overflows: words
    are at most 2^15 in size, places up to 2^22, and a part has 2^22 of them.
    """
    words = tensor.reshape(-1).view(torch.int16)
    place = torch.arange(1, min(len(words), _PART_WORDS) + 1, device=words.device)
    return torch.stack([(part * place[: len(part)]).sum() for part in words.split(_PART_WORDS)])


def device_checksum(sums: torch.Tensor) -> str:
    """Of tensor_sums; waits for the device."""
    return hashlib.sha256(sums.cpu().numpy().data).hexdigest()


def broadcast(bucket: torch.Tensor, group: dist.ProcessGroupGloo) -> dist.Work:
    """From rank 0."""
    return group.broadcast([bucket], dist.BroadcastOptions())  # type: ignore[attr-defined]
