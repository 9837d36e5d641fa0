"""`npd run`: one process per stage, in the order of the recipe; each skips what is already done."""

import logging
import signal
import subprocess
import sys

from npd_ascend.errors import UserError
from npd_ascend.parallel.launch import die_with_parent
from npd_ascend.preflight import check_run
from npd_ascend.runfolder import RunFolder
from npd_ascend.trainer.stages import phases

# A stage that dies of a signal (out of memory, a stray kill) is started again; it continues from its last commit.
RESTARTS = 2
_log = logging.getLogger(__name__)


def run_recipe(run: RunFolder) -> int:
    """SFT, then per phase rollout, score and distill, then evaluation and report; returns the exit code."""
    print(check_run(run.config), flush=True)
    for stage in recipe(run):
        code = _run_stage(run, stage)
        if code != 0:
            _log.error("npd %s ended with exit code %d; the same command continues from here", stage[0], code)
            return code
    print((run.path / "summary.txt").read_text(), end="")
    print(f"report: {run.report}")
    return 0


def recipe(run: RunFolder) -> list[list[str]]:
    """Command lines of the stages, after `npd`."""
    config = run.config
    stages = [["sft"]] if config.sft else []
    for phase in phases(config.npd) if config.npd else []:
        version = ["--version", str(phase.version)]
        stages += [["rollout", *version], ["score", *version], ["distill"]]
    return [*stages, ["eval"], ["report"]]


def _run_stage(run: RunFolder, stage: list[str]) -> int:
    command = [sys.executable, "-m", "npd_ascend", stage[0], "--run", str(run.path), *stage[1:]]
    for attempt in range(RESTARTS + 1):
        child = subprocess.Popen(command, preexec_fn=die_with_parent)
        try:
            code = child.wait()
        except KeyboardInterrupt:  # the terminal sent it to the child too
            child.wait()
            raise
        killed_by = -code if code < 0 else code - 128  # the stage itself, or one of its ranks
        if killed_by <= 0 or killed_by == signal.SIGINT:
            return code
        name = signal.Signals(killed_by).name
        if attempt < RESTARTS:
            _log.warning("npd %s was killed by %s; restart %d of %d", stage[0], name, attempt + 1, RESTARTS)
    raise UserError(f"npd {stage[0]} was killed by {name} {RESTARTS + 1} times (out of memory?); see {run.logs}")
