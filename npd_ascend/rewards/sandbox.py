"""Reward functions in a process of their own, which is killed when one of them takes too long.

A thread cannot be stopped and a signal does not reach C code, so the limit is on a process. It is started again for
the next answer, and a function that took its process along (a segmentation fault) is a failure like any other.
One JSON line goes in per answer and one comes out.
"""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict

from npd_ascend.parallel.launch import die_with_parent
from npd_ascend.rewards.functions import Answer

# starting Python and importing sympy on a busy machine; no part of an answer's time
_START_S = 300.0


class Sandbox:
    """rewards: names for functions.reward_of. timeout_s: for one answer, all its rewards together."""

    def __init__(self, rewards: Sequence[str], timeout_s: float):
        self._rewards, self._timeout_s = list(rewards), timeout_s
        self._child: subprocess.Popen | None = None

    def score(self, answer: Answer) -> tuple[dict[str, float] | None, str]:
        """(reward of each name, "") or (None, why): "timeout: ...", or "raised: ..." with the name of the reward."""
        if self._child is None:
            self._start()
        try:
            self._child.stdin.write(json.dumps(asdict(answer)).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            return None, self._stopped("raised: its process was gone")
        line = self._line(self._timeout_s)
        if line is None:
            return None, self._stopped(f"timeout: no reward within {self._timeout_s:g} s (grpo.reward_timeout_s)")
        if not line.endswith(b"\n"):
            return None, self._stopped("raised: a reward function ended its process")
        result = json.loads(line)
        return result["rewards"], result["why"]

    def close(self) -> None:
        """Nothing that was started is left."""
        if self._child is not None:
            self._stopped("")

    def _start(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "npd_ascend.rewards.child", *self._rewards],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            process_group=0,  # so that what a reward function starts ends with it
            preexec_fn=die_with_parent,
        )
        if self._line(_START_S) != b"ready\n":
            self.close()
            raise RuntimeError(f"the process of the reward functions did not start ({', '.join(self._rewards)})")

    def _line(self, timeout_s: float) -> bytes | None:
        """One line; None if it does not come in time, without its end if the process ended first."""
        ready, _, _ = select.select([self._child.stdout], [], [], timeout_s)
        # one write of the child, far below the size of a pipe: what is ready is a whole line
        return self._child.stdout.readline() if ready else None

    def _stopped(self, why: str) -> str:
        os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._child.stdin.close()
        self._child.stdout.close()
        self._child = None
        return why
