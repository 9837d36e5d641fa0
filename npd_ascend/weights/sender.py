"""The trainer's end of the fast path: the newest version in memory, handed to every rollout worker that asks.

sender.json beside the versions says where, and holds the token without which nothing is answered; it is readable for
the user alone. A version exists because it is on disk: who cannot get it here takes it from there.
"""

import json
import logging
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from npd_ascend.device import device_communicator
from npd_ascend.durable import commit_file
from npd_ascend.errors import UserError
from npd_ascend.model.decoder import Decoder
from npd_ascend.parallel.mesh import ALONE, Mesh
from npd_ascend.weights.collective import MEETINGS, GroupInfo, Snapshot, open_group
from npd_ascend.weights.control import Line, TransferError, reason_of
from npd_ascend.weights.device_group import DEVICE_BUCKET_BYTES, DeviceGroup, DeviceGroupInfo
from npd_ascend.weights.gather import whole_tensors

LOOPBACK = "127.0.0.1"
BUCKET_BYTES = 1 << 24  # small enough that receiving one and comparing another's checksum share the caches
_TURN_S = 0.5  # after which an idle thread looks whether the trainer has ended
_GRACE_S = 2.0  # from the commit of a version on disk to its offer, generously
_log = logging.getLogger(__name__)


@contextmanager
def open_sender(
    folder: Path,
    dtype: torch.dtype,
    mesh: Mesh = ALONE,
    *,
    timeout_s: float,
    host: str = LOOPBACK,
    device: torch.device | None = None,
    bucket_bytes: int | None = None,
) -> Iterator["WeightSender"]:
    """Serve workers until the block ends; called by all ranks, rank 0 listens.

    folder: of the versions, RUN/weights or GRPO's. dtype: that workers generate in. timeout_s: of silence, after which
    a worker counts as lost. host: the address of this host to listen at; UserError if it has no such address. device:
    of this process, from which weights go to the devices of the workers; None: they go from host memory. bucket_bytes:
    of one broadcast.
    """
    if device:
        device_communicator(device)  # told now, and not when a worker asks
    usual = DEVICE_BUCKET_BYTES if device else BUCKET_BYTES
    sender = WeightSender(
        folder,
        dtype,
        mesh,
        timeout_s=timeout_s,
        host=host,
        device=device,
        bucket_bytes=bucket_bytes or usual,
    )
    try:
        yield sender
    finally:
        sender.close()


class WeightSender:
    """Has one thread to accept workers and one per worker; what happens to a worker is a line in the log here."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        mesh: Mesh,
        *,
        timeout_s: float,
        host: str,
        device: torch.device | None,
        bucket_bytes: int,
    ):
        self._dtype, self._timeout_s, self._bucket_bytes, self._host = dtype, timeout_s, bucket_bytes, host
        self._device = device
        self._version = -1  # the newest that was offered
        self._snapshot: Snapshot | None = None  # of it, once it is made
        self._changed, self._closed = threading.Condition(), False
        self._threads: list[threading.Thread] = []
        self._file = folder / "sender.json" if mesh.rank == 0 else None
        self._meetings = folder / MEETINGS
        if self._file:
            shutil.rmtree(self._meetings, ignore_errors=True)
            self._meetings.mkdir(mode=0o700, parents=True)
            self._token = secrets.token_hex(32)
            self._server = _listen(host)
            with commit_file(self._file) as draft:
                draft.touch(mode=0o600)
                draft.write_text(json.dumps({"host": host, "port": _port(self._server), "token": self._token}))
            self._start(self._accept)

    def offer(self, version: int, model: Decoder, mesh: Mesh = ALONE) -> float:
        """Hand out `version`, which is published, from now on; called by all ranks.

        Returns the seconds that it took to copy it; the model may change again at once.
        """
        if mesh.dp_rank > 0:
            return 0.0
        if not self._file:
            for _ in whole_tensors(model, mesh):
                pass
            return 0.0
        self._set(version, None)  # before the copy is made: there should be one of them at a time
        snapshot = Snapshot(version, model, mesh, self._dtype, self._bucket_bytes, self._device)
        self._set(version, snapshot)
        self._start(snapshot.manifest)  # before a worker has to wait for it
        return snapshot.gather_s

    def _set(self, version: int, snapshot: Snapshot | None) -> None:
        with self._changed:
            self._version, self._snapshot = version, snapshot
            self._changed.notify_all()

    def close(self) -> None:
        """Transfers that have begun are finished, for at most timeout_s."""
        if not self._file or self._closed:
            return
        self._closed = True
        self._file.unlink(missing_ok=True)
        self._server.shutdown(socket.SHUT_RDWR)  # wakes up the thread that accepts
        self._server.close()
        deadline = time.monotonic() + self._timeout_s
        # one that still held a tensor when the interpreter ends would abort the process
        while (threads := self._alive()) and (left := deadline - time.monotonic()) > 0:
            threads[0].join(left)
        shutil.rmtree(self._meetings, ignore_errors=True)

    def _start(self, work: Callable[..., object], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        with self._changed:
            thread.start()
            self._threads = [*self._alive(), thread]

    def _alive(self) -> list[threading.Thread]:
        return [thread for thread in self._threads if thread.is_alive()]

    def _accept(self) -> None:
        while not self._closed:
            try:
                connected, (host, port) = self._server.accept()
            except OSError as error:
                if not self._closed:
                    _log.warning("weights: no more workers can connect (%s)", error)
                return
            self._start(self._serve, connected, f"{host}:{port}")

    def _serve(self, connected: socket.socket, peer: str) -> None:
        try:
            with connected:
                self._serve_worker(Line(connected, self._token, peer, self._timeout_s, serves=True))
        except TransferError as error:
            _log.warning("weights: %s", error)

    def _serve_worker(self, line: Line) -> None:
        """Until it hangs up, or does not keep to what was agreed: then TransferError, and it may connect anew."""
        hello = line.receive()
        line.peer = f"rollout worker {hello['worker']} at {line.peer}"
        if hello["device"] != (self._device is not None):
            line.send({"refused": "rollout.weights is not the same there and here; start them with one configuration"})
            raise TransferError(f"{line.peer}: rollout.weights is not the same there and here")
        with _lost(line.peer, "before it joined the group"):
            meet = self._meet_in_file if self._device is None else self._meet_at_port
            group = meet(line, 1 + hello["ranks"])
        _log.info("weights: %s is connected", line.peer)
        try:
            while not self._closed and line.is_open():
                if line.wait(_TURN_S):
                    self._hand_out(line.receive()["version"], line, group)
        finally:
            if isinstance(group, DeviceGroup):
                group.close()

    def _meet_in_file(self, line: Line, world_size: int) -> dist.ProcessGroupGloo:
        meeting = secrets.token_hex(16)
        info = GroupInfo(
            meeting=str(self._meetings / meeting),
            own_host=self._host,
            world_size=world_size,
            timeout_s=self._timeout_s,
        )
        line.send({"meeting": meeting})
        return open_group(info, 0)

    def _meet_at_port(self, line: Line, world_size: int) -> DeviceGroup:
        with _listen(self._host) as server:
            port = _port(server)
            info = DeviceGroupInfo(host=self._host, port=port, world_size=world_size, bucket_bytes=self._bucket_bytes)
            line.send({"port": port, "bucket_bytes": self._bucket_bytes})
            return DeviceGroup(server, info, self._device, self._timeout_s)

    def _hand_out(self, version: int, line: Line, group: dist.ProcessGroupGloo | DeviceGroup) -> None:
        with self._changed:
            # the worker may have seen it on disk just before it was offered, or while it is copied
            self._changed.wait_for(lambda: self._version >= version, min(_GRACE_S, self._timeout_s / 4))
            self._changed.wait_for(lambda: self._snapshot or self._version != version, self._timeout_s / 2)
            newest, snapshot = self._version, self._snapshot
        if snapshot is None or newest != version:
            line.send({"refused": f"it has {f'version {newest}' if newest >= 0 else 'no version yet'}, not {version}"})
            return
        with _lost(line.peer, f"before version {version} was sent"):
            manifest = snapshot.manifest()
        line.send({"manifest": asdict(manifest)})
        _raise_failed(line)
        with _lost(line.peer, f"while version {version} was sent"):
            if isinstance(group, DeviceGroup):
                group.send(snapshot, line)
                line.send({"sent": version})
            else:
                snapshot.send(group)
        _raise_failed(line)


def _raise_failed(line: Line) -> None:
    if reason := line.receive()["failed"]:
        raise TransferError(f"{line.peer}: {reason}")


@contextmanager
def _lost(peer: str, when: str) -> Iterator[None]:
    """gloo and HCCL say a lost peer as a RuntimeError without a name."""
    try:
        yield
    except TransferError:  # has one
        raise
    except RuntimeError as error:
        raise TransferError(f"{peer}: lost {when} ({reason_of(error)})") from None


def _listen(host: str) -> socket.socket:
    try:
        return socket.create_server((host, 0))
    except OSError as error:
        raise UserError(f"weights: this host cannot listen at {host} ({error}); name an address of its own") from None


def _port(server: socket.socket) -> int:
    return server.getsockname()[1]
