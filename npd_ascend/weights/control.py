"""A control connection between two processes that share a secret: small JSON messages over TCP, each with its HMAC.

Both sides begin with 16 random bytes; the key of a connection is made of the secret and both of them, so nothing that
was said on another connection counts here. Nothing is parsed before its HMAC was compared.
"""

import hashlib
import hmac
import json
import re
import secrets
import socket
import struct
import time
from typing import Any

_NONCE_BYTES = 16
_MAC_BYTES = 32
_MOST_BYTES = 1 << 24  # of one message; who has no token must not make us reserve memory

SILENCE_S = 60.0  # of one end, after which the other gives it up; less than processes.timeout_s should be


class TransferError(RuntimeError):
    """The weights did not come. Who asked still has those of before, and finds the new ones on disk."""


def reason_of(error: RuntimeError) -> str:
    """In one line; gloo's begin with a place in its source and end with advice."""
    return re.sub(r"^\[[^]]*\] ", "", str(error).splitlines()[0]).split(". ")[0]


class Line:
    """One end of a connection; both fail with TransferError within timeout_s (seconds) of silence.

    peer: who is at the other end, for errors. Messages of the two ends differ in their HMAC, as do equal messages one
    after the other: none can be sent back, repeated or left out.
    """

    def __init__(self, connected: socket.socket, token: str, peer: str, timeout_s: float, *, serves: bool):
        self.peer, self._socket, self._timeout_s = peer, connected, timeout_s
        connected.settimeout(timeout_s)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # the other host may vanish without a word
        mine = secrets.token_bytes(_NONCE_BYTES)
        self._write(mine)
        nonces = [self._read(_NONCE_BYTES, time.monotonic() + timeout_s), mine]
        self._key = hmac.digest(token.encode(), b"".join(nonces if serves else nonces[::-1]), hashlib.sha256)
        self._mine, self._theirs = (b"server", b"client") if serves else (b"client", b"server")
        self._sent = self._received = 0

    @property
    def own_address(self) -> str:
        """The address of this host by which the peer reaches it."""
        return self._socket.getsockname()[0]

    def send(self, message: dict[str, Any]) -> None:
        payload = json.dumps(message).encode()
        self._write(struct.pack("!I", len(payload)) + self._mac(self._mine, self._sent, payload) + payload)
        self._sent += 1

    def receive(self) -> dict[str, Any]:
        """The next message, whole; TransferError if it is not, or not from who has the token."""
        deadline = time.monotonic() + self._timeout_s
        (size,) = struct.unpack("!I", self._read(4, deadline))
        if size > _MOST_BYTES:
            raise TransferError(f"{self.peer}: a message of {size} bytes is none of ours")
        mac, payload = self._read(_MAC_BYTES, deadline), self._read(size, deadline)
        if not hmac.compare_digest(mac, self._mac(self._theirs, self._received, payload)):
            raise TransferError(f"{self.peer}: does not have the token of this run, or a message was changed")
        self._received += 1
        return json.loads(payload)

    def wait(self, at_most_s: float) -> bool:
        """Whether a message begins within at_most_s; False at once if the peer has hung up."""
        try:
            self._socket.settimeout(at_most_s)
            return bool(self._socket.recv(1, socket.MSG_PEEK))
        except OSError:  # a time-out among them
            return False

    def is_open(self) -> bool:
        """Whether the peer has not hung up."""
        try:
            self._socket.settimeout(0)
            return bool(self._socket.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def hang_up(self) -> None:
        self._socket.close()

    def _mac(self, side: bytes, number: int, payload: bytes) -> bytes:
        return hmac.digest(self._key, side + struct.pack("!Q", number) + payload, hashlib.sha256)

    def _write(self, data: bytes) -> None:
        try:
            self._socket.settimeout(self._timeout_s)
            self._socket.sendall(data)
        except OSError as error:
            raise TransferError(f"{self.peer}: hung up or does not listen ({error})") from None

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
                part = self._socket.recv(min(size - len(data), 1 << 16))
            except TimeoutError:
                raise TransferError(f"{self.peer}: said nothing for {self._timeout_s:g} s") from None
            except OSError as error:
                raise TransferError(f"{self.peer}: hung up ({error})") from None
            if not part:
                raise TransferError(f"{self.peer}: hung up" + (" in the middle of a message" if data else ""))
            data += part
        return bytes(data)
