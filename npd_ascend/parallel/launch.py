"""The trainer's ranks on this host, as children of the process that the user started; over several nodes its share.

torchrun does the same (each rank then finds RANK and WORLD_SIZE and this file is not used); here a wrong input should
be said once and in one line, and a killed rank should be known from a failed one.
"""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from npd_ascend.errors import LostRankError, UserError
from npd_ascend.ranks import Node, node_rank_environment, rank_environment, this_node

_PR_SET_PDEATHSIG = 1
# after one rank failed the others notice by themselves, from the broken connection; then they are made to stop
_GRACE_S = 10
_CONNECT_S, _POLL_S = 60, 0.1


def run_ranks(arguments: list[str], world_size: int, logs: Path, name: str, timeout_s: int) -> int:
    """`npd ARGUMENTS` as `world_size` ranks; returns 0 or the first exit code that was not, 128 + signal if killed.

    Of several nodes each starts its ranks. Rank 0 has its terminal; the others write RUN/logs/<name>.rank<N>.log. None
    outlives this call. UserError if the nodes cannot share the ranks, or nobody keeps their meeting place;
    LostRankError if another node did not come within timeout_s.
    """
    node = this_node()
    here = ranks_of(node, world_size)
    with tempfile.TemporaryDirectory(prefix="npd-ranks-") as folder:
        if node.count == 1:
            environments = [rank_environment(rank, world_size, f"file://{folder}/store") for rank in here]
        else:
            meeting = next_meeting(node, timeout_s)
            environments = [node_rank_environment(node, rank, world_size, meeting) for rank in here]
        ranks = {
            rank: _start(arguments, environment, _log_file(logs, name, rank))
            for rank, environment in zip(here, environments, strict=True)
        }
        try:
            return _wait(ranks, logs, name)
        finally:
            _stop(list(ranks.values()))


def ranks_of(node: Node, world_size: int) -> range:
    """The ranks that run there: every node has as many, and neighbours stay together."""
    if world_size % node.count:
        raise UserError(
            f"parallel.tp x parallel.dp = {world_size} ranks do not divide over NNODES={node.count}; change one of them"
        )
    each = world_size // node.count
    return range(node.rank * each, (node.rank + 1) * each)


def next_meeting(node: Node, timeout_s: int) -> int:
    """The number of a meeting that no rank has been to, once all nodes have come to it.

    Counted by node 0's `npd run`. Nodes notice a lost rank at different times, one of them perhaps minutes after
    another; who comes back early waits here, and with the same number if it has to come again, or they would count
    past each other for ever. So each node keeps two counts: the meeting that it last came to, and the last that it
    saw all the others come to; the others may be there already when it comes again.
    """
    from torch.distributed import TCPStore  # a run on one node waits for no torch

    try:
        store = TCPStore(node.address, node.port, is_master=False, timeout=timedelta(seconds=_CONNECT_S))
        keys, met = [f"ranks of node {rank}" for rank in range(node.count)], f"last meeting of node {node.rank}"
        latest, last = max(store.add(key, 0) for key in keys), store.add(met, 0)
        meeting = latest + 1 if latest == last else latest
        store.add(keys[node.rank], meeting - store.add(keys[node.rank], 0))
        started = time.monotonic()
        while late := [rank for rank, key in enumerate(keys) if store.add(key, 0) < meeting]:
            if time.monotonic() - started > timeout_s:
                raise LostRankError(
                    f"waited {timeout_s} s (parallel.timeout_s) for the ranks of node {', '.join(map(str, late))}; "
                    f"the same command goes on from the last checkpoint"
                )
            time.sleep(_POLL_S)
        store.add(met, meeting - last)
        return meeting
    except RuntimeError as error:
        raise UserError(
            f"MASTER_ADDR={node.address}, MASTER_PORT={node.port}: node 0 does not answer ({str(error).splitlines()[0]}"
            f"); start `npd run` on every node"
        ) from None


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


def _wait(ranks: dict[int, subprocess.Popen], logs: Path, name: str) -> int:
    children = ranks.values()
    while any(child.poll() is None for child in children) and not any(child.poll() for child in children):
        time.sleep(0.05)
    failed = [(number, child.returncode) for number, child in ranks.items() if child.returncode]
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
