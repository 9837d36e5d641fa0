"""The trainer's ranks on one host, as children of the process that the user started.

torchrun does the same over several hosts (each rank then finds RANK and WORLD_SIZE and this file is not used); here a
wrong input should be said once and in one line, and a killed rank should be known from a failed one.
"""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from npd_ascend.device import rank_environment

_PR_SET_PDEATHSIG = 1
# after one rank failed the others notice by themselves, from the broken connection; then they are made to stop
_GRACE_S = 10


def run_ranks(arguments: list[str], world_size: int, logs: Path, name: str) -> int:
    """`npd ARGUMENTS` as `world_size` ranks; returns 0 or the first exit code that was not, 128 + signal if killed.

    Rank 0 has this terminal; the others write RUN/logs/<name>.rank<N>.log. None outlives this call.
    """
    with tempfile.TemporaryDirectory(prefix="npd-ranks-") as folder:
        ranks = [
            _start(arguments, rank_environment(rank, world_size, f"file://{folder}/store"), _log_file(logs, name, rank))
            for rank in range(world_size)
        ]
        try:
            return _wait(ranks, logs, name)
        finally:
            _stop(ranks)


def die_with_parent() -> None:
    """For preexec_fn: a child must not outlive its parent, or a second run would meet it in the same folder."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _log_file(logs: Path, name: str, rank: int) -> Path | None:
    return logs / f"{name}.rank{rank}.log" if rank else None


def _start(arguments: list[str], environment: dict[str, str], log: Path | None) -> subprocess.Popen:
    command = [sys.executable, "-m", "npd_ascend", *arguments]
    output = log.open("a") if log else None
    try:
        return subprocess.Popen(
            command, env=os.environ | environment, stdout=output, stderr=output, preexec_fn=die_with_parent
        )
    finally:
        if output:
            output.close()


def _wait(ranks: list[subprocess.Popen], logs: Path, name: str) -> int:
    while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
        time.sleep(0.05)
    failed = [(number, rank.returncode) for number, rank in enumerate(ranks) if rank.returncode]
    if not failed:
        return 0
    # who was killed is the cause, who lost a neighbour the effect
    number, code = next(((number, code) for number, code in failed if code < 0), failed[0])
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    if number or code < 0:
        log = _log_file(logs, name, number)
        print(f"npd {name}: rank {number} {how}{f'; see {log}' if log else ''}", file=sys.stderr)
    return code if code > 0 else 128 - code


def _stop(ranks: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + _GRACE_S
    if any(rank.returncode for rank in ranks):
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
        rank.wait()
