"""A sign of life for the supervisor, and waiting for another process without losing it."""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

_POLL_S = 0.1  # and no touch before it is over: it is a message where the file lies on another host
_SAY_S = 20
_log = logging.getLogger(__name__)


class Heartbeat:
    """A file that is touched while its process gets on with its work, or waits with open eyes."""

    def __init__(self, path: Path):
        self.path = path
        self._touched = -math.inf
        self.beat()

    def beat(self) -> None:
        """Some work is done, be it ever so little."""
        self._worked = self._said = now = time.monotonic()
        if now - self._touched >= _POLL_S:
            self.path.touch()
            self._touched = now

    def wait(self, ready: Callable[[], bool], what: str, at_most_s: float = math.inf) -> float:
        """Return when `ready` is true or the time is up: the seconds that took. `what`: said in the log every
        20 seconds without work."""
        started = time.monotonic()
        while not ready() and time.monotonic() - started < at_most_s:
            self.path.touch()
            time.sleep(_POLL_S)
            if time.monotonic() - self._said > _SAY_S:
                self._said = time.monotonic()
                _log.info("waiting for %s since %.0f s", what, self._said - self._worked)
        return time.monotonic() - started
