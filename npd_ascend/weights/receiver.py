"""A rollout worker's end of the fast path: who sends, what comes. The tensors go to the engine's own ranks.

What fails hangs up, and the next transfer begins with a new connection, be it to a trainer that was started again.
"""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from npd_ascend.weights.collective import MEETINGS, GroupInfo, Manifest
from npd_ascend.weights.control import Line, TransferError, reason_of
from npd_ascend.weights.device_group import DeviceGroupInfo


class WeightReceiver:
    """For one engine, whose ranks share a group with the trainer as long as this is connected to it.

    folder: of the versions, RUN/weights or GRPO's. worker: its name in the trainer's log. timeout_s: of silence, then
    TransferError. device: whether the weights go from device to device.
    """

    def __init__(self, folder: Path, worker: str, *, timeout_s: float, device: bool = False):
        self._file, self._worker, self._timeout_s = folder / "sender.json", worker, timeout_s
        self._device = device
        self._line: Line | None = None
        self._owes_answer = False  # to a manifest, how its transfer ended

    @contextmanager
    def transfer(self, version: int) -> Iterator[None]:
        """Around connect, manifest, start, the broadcasts and, between devices, confirm, in this order; the trainer is
        told how it ended.

        Whatever RuntimeError is raised inside, gloo's among them, ends in TransferError, which names the version.
        """
        try:
            yield
        except RuntimeError as error:
            reason = reason_of(error)
            self._say_failed(reason)
            self.hang_up()
            raise TransferError(f"weight version {version} did not come from memory: {reason}") from None
        self._say_failed(None)

    def connect(self, ranks: int) -> GroupInfo | DeviceGroupInfo | None:
        """The group that the engine's ranks must join now; None if they are in it already."""
        if self._line and self._line.is_open():
            return None
        self.hang_up()
        try:
            sender = json.loads(self._file.read_text())
            address = (sender["host"], sender["port"])
            connected = socket.create_connection(address, self._timeout_s)
        except FileNotFoundError:
            raise TransferError(f"{self._file}: not there, so no trainer sends weights") from None
        except OSError as error:
            raise TransferError(f"{self._file}: the trainer does not answer ({error})") from None
        peer = f"the trainer at {sender['host']}:{sender['port']}"
        try:
            self._line = Line(connected, sender["token"], peer, self._timeout_s, serves=False)
            self._line.send({"worker": self._worker, "ranks": ranks, "device": self._device})
            answer = self._receive()
        except TransferError:
            connected.close()
            raise
        if self._device:
            return DeviceGroupInfo(
                host=sender["host"], port=answer["port"], world_size=1 + ranks, bucket_bytes=answer["bucket_bytes"]
            )
        return GroupInfo(
            meeting=str(self._file.parent / MEETINGS / answer["meeting"]),
            own_host=self._line.own_address,
            world_size=1 + ranks,
            timeout_s=self._timeout_s,
        )

    def manifest(self, version: int) -> Manifest:
        """What the trainer sends after `start`; TransferError if it has another version."""
        self._line.send({"version": version})
        answer = self._receive()
        self._owes_answer = True
        return Manifest(**answer["manifest"])

    def _receive(self) -> dict[str, Any]:
        answer = self._line.receive()
        if "refused" in answer:
            raise TransferError(f"{self._line.peer}: {answer['refused']}")
        return answer

    def start(self) -> None:
        """The trainer may send: the broadcasts of a manifest that was found good begin now."""
        self._line.send({"failed": None})

    def confirm(self) -> None:
        """After the broadcasts between devices: the trainer has sent all of it, and did not give up on the way."""
        self._receive()

    def _say_failed(self, reason: str | None) -> None:
        """What is here is here, and what is not is not, whether or not the trainer still listens."""
        if self._owes_answer:
            with suppress(TransferError):
                self._line.send({"failed": reason})
        self._owes_answer = False

    def hang_up(self) -> None:
        if self._line:
            self._line.hang_up()
        self._line = None
