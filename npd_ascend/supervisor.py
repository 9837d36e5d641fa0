"""`npd run`: the processes of a run, group after group; each skips what is already done."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from npd_ascend.errors import LostRankError, UserError
from npd_ascend.nodes import Nodes
from npd_ascend.parallel.launch import die_with_parent
from npd_ascend.placement import Process, place, recipe, share
from npd_ascend.ranks import visible_cards
from npd_ascend.ray_nodes import RayProcess, Shortage, join_cluster
from npd_ascend.runfolder import RunFolder, keep_config, leave_run

_POLL_S = 0.1
# how long the others may take to end after one was interrupted
_GRACE_S = 10
_log = logging.getLogger(__name__)


def run_recipe(run: RunFolder, nodes: Nodes, arguments: Sequence[str]) -> int:
    """SFT, rollouts, scoring and distillation, evaluation and report; returns the exit code.

    arguments: of `npd run`, for the check; the folder keeps its configuration only if that lets it pass.
    Of several nodes each runs its share of every group, and begins the next when all have done theirs.
    """
    if code := _check(run, arguments):
        if nodes.here.count == 1:  # the others write there
            leave_run(run)
        nodes.end(f"the check before the run ended with exit code {code}, for a reason that it said there")
        return code
    nodes.meet("the check before the run")
    if nodes.here.rank == 0:
        keep_config(run)
    nodes.meet("the configuration is kept")
    if run.config.processes.ray:
        join_cluster(run.config)
    for number, group in enumerate(recipe(run.config), 1):
        # of several nodes one may see a file before another does, and they have to walk in step
        if nodes.here.count == 1 and all(_is_done(run, process) for process in group):
            continue
        code = _run_group(run, share(run.config, group, nodes.here), nodes)
        if code != 0:
            nodes.end(f"{group[0].name} and what runs beside it ended with exit code {code}; see {run.logs}")
            return code
        nodes.meet(f"the end of group {number}")
    if nodes.here.rank == 0:
        print((run.path / "summary.txt").read_text(), end="")
        print(f"report: {run.report}")
    return 0


def _is_done(run: RunFolder, process: Process) -> bool:
    """Whether it would find that nothing is left to do; it looks itself too, after seconds of imports."""
    match process.arguments:
        case ("sft",):
            return run.has_trained("sft")
        case ("rollout" | "score", "--set", number, *_):
            return run.stream.is_decided(int(number))
        case ("distill",):
            return run.has_trained("npd")
    return False


@dataclass(slots=True)
class _Running:
    process: Process
    child: subprocess.Popen | RayProcess
    environment: dict[str, str]
    started: float  # time.time(), as file times are
    restarts: int = 0
    log: Path | None = None


def _run_group(run: RunFolder, group: list[Process], nodes: Nodes) -> int:
    """Until all have ended with 0, or one with a code that is no reason to start it again."""
    placed = place(run.config, group, visible_cards(run.config.device.kind))
    running = [_start(run, process, placed[process.name], first=process is group[0]) for process in group]
    shortage = Shortage(run.config)
    try:
        while running:
            time.sleep(_POLL_S)
            nodes.look()
            shortage.look([one.process for one in running])
            for one in list(running):
                _kill_if_hung(run, one)
                code = one.child.poll()
                if code is None:
                    continue
                if code == 0:
                    running.remove(one)
                elif (reason := _why_again(one, code)) is None:
                    return _say_end(one, code)
                else:
                    running[running.index(one)] = _start_again(run, one, reason, first=one.process is group[0])
    except KeyboardInterrupt:  # the terminal sent it to the children too
        deadline = time.monotonic() + _GRACE_S
        while any(one.child.poll() is None for one in running) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        raise
    finally:
        for one in running:
            one.child.kill()
            one.child.wait()
    return 0


def _check(run: RunFolder, arguments: Sequence[str]) -> int:
    """`npd run --dry-run` in a process that ends: it loads the teacher, and this one would hold that memory."""
    command = [sys.executable, "-m", "npd_ascend", "run", "--dry-run", *arguments]
    code = subprocess.run(command, preexec_fn=_end_with_parent, check=False).returncode
    if code < 0:
        raise UserError(
            f"{run.path}: the check before the run was killed by {signal.Signals(-code).name}, perhaps for memory: it "
            f"loads the teacher; the same command tries again"
        )
    return code


def _end_with_parent() -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it here too; the parent says so


def _start(
    run: RunFolder, process: Process, environment: dict[str, str], *, first: bool, restarts: int = 0
) -> _Running:
    command, path = process.command(run.config), run.logs / f"{process.name}.log"
    if run.config.processes.ray and process.needs:
        return _Running(process, RayProcess(command, path, process.needs), environment, time.time(), restarts, path)
    log = None if first else path
    output: IO | None = log.open("a") if log else None
    # with the terminal it says how far it is; results that it prints when typed alone come at the end of `npd run`
    results = output or subprocess.DEVNULL
    try:
        child = subprocess.Popen(
            command, env=os.environ | environment, stdout=results, stderr=output, preexec_fn=die_with_parent
        )
    finally:
        if output:
            output.close()
    return _Running(process, child, environment, time.time(), restarts, log)


def _start_again(run: RunFolder, one: _Running, reason: str, *, first: bool) -> _Running:
    most, log = run.config.processes.restarts, f"; see {one.log}" if one.log else ""
    if one.restarts >= most:
        raise UserError(
            f"npd {one.process.name} {reason}, after {most} restarts (processes.restarts){log or f'; see {run.logs}'}; "
            f"the same command goes on from here"
        )
    _log.warning("npd %s %s; restart %d of %d%s", one.process.name, reason, one.restarts + 1, most, log)
    return _start(run, one.process, one.environment, first=first, restarts=one.restarts + 1)


def _why_again(one: _Running, code: int) -> str | None:
    """None if a new process would end in the same way, or if somebody wanted it to end."""
    killed_by = -code if code < 0 else code - 128  # the process itself, or one of its ranks
    if killed_by == signal.SIGINT or code == 2:
        return None
    if code == LostRankError.exit_code:
        return "lost one of its ranks"
    if killed_by in set(signal.Signals):
        return f"was killed by {signal.Signals(killed_by).name}"
    return f"crashed with exit code {code}" if one.process.watched else None


def _kill_if_hung(run: RunFolder, one: _Running) -> None:
    beat = run.logs / f"{one.process.name}.beat"
    if not one.process.watched or one.child.poll() is not None:
        return
    silent = time.time() - max(one.started, beat.stat().st_mtime if beat.exists() else 0)
    if silent > run.config.processes.timeout_s:
        _log.warning("npd %s gave no sign of life for %.0f s (processes.timeout_s)", one.process.name, silent)
        one.child.kill()
        one.child.wait()


def _say_end(one: _Running, code: int) -> int:
    """The exit code of the run; what a process without the terminal had to say."""
    if one.log and code == 2:
        said = [line for line in one.log.read_text(errors="replace").splitlines() if line.startswith("npd ")]
        if said:
            print(said[-1], file=sys.stderr)
    then = (
        "mend that, and the same command continues from here" if code == 2 else "the same command continues from here"
    )
    _log.error("npd %s ended with exit code %d; %s", one.process.name, code, then)
    return code
