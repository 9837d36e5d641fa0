"""`npd sweep`: replays of one recorded stream under many settings, with several seeds, in one table and one plot.

A seed is run.seed of the replay: the order of samples and packs. What was generated is the same for all.
"""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from npd_ascend.config import load_yaml
from npd_ascend.errors import UserError
from npd_ascend.parallel.launch import die_with_parent
from npd_ascend.progress import progress
from npd_ascend.replay import plan_replay
from npd_ascend.report.sweep import Outcome, write_sweep_report


class SweepConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Path  # a recorded run
    folder: Path  # of the replays and their table
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    variants: dict[str, tuple[str, ...]] = Field(min_length=1)  # name -> key=value, as of `npd replay`


@dataclass(frozen=True, slots=True)
class _Replay:
    variant: str
    seed: int
    overrides: tuple[str, ...]
    folder: Path

    @property
    def is_done(self) -> bool:
        return (self.folder / "summary.json").exists() and (self.folder / "student").exists()


def run_sweep(file: Path, jobs: int) -> None:
    """Every replay that is not there yet, `jobs` at a time, then sweep.json, sweep.md and sweep.html in its folder.

    UserError before the first replay if one of them would be refused.
    """
    config = _load(file)
    replays = [
        _Replay(name, seed, (*overrides, f"run.seed={seed}"), config.folder / f"{_slug(name)}-seed{seed}")
        for name, overrides in config.variants.items()
        for seed in config.seeds
    ]
    for replay in replays:
        try:
            plan_replay(config.source, replay.folder, replay.overrides)
        except UserError as error:
            raise UserError(f"{file}: variant {replay.variant!r}: {error}") from None
    config.folder.mkdir(parents=True, exist_ok=True)
    left = [replay for replay in replays if not replay.is_done]
    with (
        progress("sweep", len(replays), "replays", len(replays) - len(left)) as bar,
        ThreadPoolExecutor(jobs) as pool,
    ):
        try:
            for _ in pool.map(lambda replay: _run(config.source, replay), left):
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what runs is finished
            raise
    outcomes = [_outcome(replay) for replay in replays]
    write_sweep_report(config.folder, config.source, config.variants, outcomes)
    print((config.folder / "sweep.md").read_text(), end="")
    print(f"page: {config.folder / 'sweep.html'}")


def _load(file: Path) -> SweepConfig:
    config = load_yaml(SweepConfig, file, ())
    names = [_slug(name) for name in config.variants]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{file}: variants: several would have the folder {min(twice)}; give them other names")
    return config.model_copy(update={"source": config.source.absolute(), "folder": config.folder.absolute()})


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _run(source: Path, replay: _Replay) -> None:
    """One replay in a process of its own, with what it says in a file beside its folder."""
    log = replay.folder.with_suffix(".log")
    command = [sys.executable, "-m", "npd_ascend", "replay", "--run", str(source), str(replay.folder)]
    command += replay.overrides
    with log.open("a") as output:
        done = subprocess.run(command, stdout=output, stderr=output, check=False, preexec_fn=die_with_parent)
    if done.returncode:
        said = [line for line in log.read_text().splitlines() if line.startswith("npd ")]
        reason = said[-1] if said else f"exit code {done.returncode}"
        raise UserError(f"variant {replay.variant!r}, seed {replay.seed}: {reason}; see {log}")


def _outcome(replay: _Replay) -> Outcome:
    summary = json.loads((replay.folder / "summary.json").read_text())
    return Outcome(
        variant=replay.variant,
        seed=replay.seed,
        exact_match=summary["scores"]["npd"],
        heldout_kl=summary["heldout_kl"]["last"],
        drift_max=summary["drift_max"],
        kept_share=summary["kept_share"],
        tokens_trained=summary["tokens"]["trained_by_stage"]["npd"],
        steps=summary["steps"]["npd"],
    )
