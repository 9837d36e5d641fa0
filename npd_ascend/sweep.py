"""`npd sweep`: one recorded stream replayed, or one configuration run, under many settings and with several seeds; one
table and one plot.

A seed is run.seed: in a replay the order of samples and packs, where what was generated is the same for all; in a run
also the initial weights, where they are random, and every answer.
"""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from npd_ascend.config import load_config
from npd_ascend.config_file import load_yaml, override
from npd_ascend.durable import make_folder
from npd_ascend.errors import UserError
from npd_ascend.parallel.launch import die_with_parent
from npd_ascend.progress import progress
from npd_ascend.replay import plan_replay
from npd_ascend.report.sweep import Outcome, write_sweep_report
from npd_ascend.runfolder import allowed_changes


class SweepConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Path | None = None  # a recorded run, of which every variant is a replay
    config: Path | None = None  # or the YAML of a run, which every variant is from the beginning
    folder: Path  # of the runs and their table
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    settings: tuple[str, ...] = ()  # key=value of all variants, as on the command line
    variants: dict[str, tuple[str, ...]] = Field(min_length=1)  # name -> its own, which come after them

    @model_validator(mode="after")
    def _one_origin(self):
        if (self.source is None) == (self.config is None):
            raise ValueError("want source, a recorded run to replay, or config, the YAML of runs; set one of them")
        return self


@dataclass(frozen=True, slots=True)
class _Run:
    variant: str
    seed: int
    overrides: tuple[str, ...]
    folder: Path

    @property
    def is_done(self) -> bool:
        return (self.folder / "summary.json").exists() and (self.folder / "student").exists()


def run_sweep(file: Path, jobs: int) -> None:
    """Every run that is not there yet, `jobs` at a time, then sweep.json, sweep.md and sweep.html in its folder.

    UserError before the first one if one of them would be refused for its settings.
    """
    sweep = _load(file)
    runs = [
        _Run(name, seed, (*sweep.settings, *overrides, f"run.seed={seed}"), sweep.folder / f"{_slug(name)}-seed{seed}")
        for name, overrides in sweep.variants.items()
        for seed in sweep.seeds
    ]
    for run in runs:
        try:
            _check(sweep, run)
        except UserError as error:
            raise UserError(f"{file}: variant {run.variant!r}: {error}") from None
    make_folder(sweep.folder)
    left = [run for run in runs if not run.is_done]
    with progress("sweep", len(runs), "runs", len(runs) - len(left)) as bar, ThreadPoolExecutor(jobs) as pool:
        try:
            for _ in pool.map(lambda run: _do(sweep, run), left):
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what runs is finished
            raise
    outcomes = [_outcome(run) for run in runs]
    origin = f"Recorded run: {sweep.source.name}" if sweep.source else f"Configuration: {sweep.config.name}"
    origin = " ".join([f"{origin}, all with", *sweep.settings] if sweep.settings else [origin]) + "."
    write_sweep_report(sweep.folder, origin, sweep.variants, outcomes)
    print((sweep.folder / "sweep.md").read_text(), end="")
    print(f"page: {sweep.folder / 'sweep.html'}")


def _load(file: Path) -> SweepConfig:
    sweep = load_yaml(SweepConfig, file, ())
    names = [_slug(name) for name in sweep.variants]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{file}: variants: several would have the folder {min(twice)}; give them other names")
    paths = {"source": sweep.source, "config": sweep.config, "folder": sweep.folder}
    return sweep.model_copy(update={key: path.absolute() for key, path in paths.items() if path})


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _check(sweep: SweepConfig, run: _Run) -> None:
    if sweep.source:
        plan_replay(sweep.source, run.folder, run.overrides)
    else:
        allowed_changes(load_config(sweep.config, [*run.overrides, override("run.folder", run.folder)]))


def _do(sweep: SweepConfig, run: _Run) -> None:
    """One run in a process of its own, with what it says in a file beside its folder."""
    log = run.folder.with_name(f"{run.folder.name}.log")  # a name may hold dots
    command = [sys.executable, "-m", "npd_ascend"]
    if sweep.source:
        command += ["replay", "--run", str(sweep.source), str(run.folder), *run.overrides]
    else:
        command += ["run", "--config", str(sweep.config), override("run.folder", run.folder), *run.overrides]
    with log.open("a") as output:
        before = output.tell()  # of an earlier attempt
        done = subprocess.run(command, stdout=output, stderr=output, check=False, preexec_fn=die_with_parent)
    if done.returncode:
        lines = log.read_bytes()[before:].decode(errors="replace").strip().splitlines()
        said = [line for line in lines if line.startswith("npd ")] or lines  # the reason, in one line
        reason = f"exit code {done.returncode}" + (f", {said[-1]}" if said else "")
        raise UserError(f"variant {run.variant!r}, seed {run.seed}: {reason}; see {log}")


def _outcome(run: _Run) -> Outcome:
    summary = json.loads((run.folder / "summary.json").read_text())
    return Outcome(
        variant=run.variant,
        seed=run.seed,
        sft=summary["scores"]["sft"],
        npd=summary["scores"]["npd"],
        grpo=summary["scores"].get("grpo"),  # that and lag are not in folders of older versions
        heldout_kl=summary["heldout_kl"]["last"],
        drift_max=summary["drift_max"],
        lag=summary.get("lag"),
        kept_share=summary["kept_share"],
        npd_tokens=summary["tokens"]["trained_by_stage"]["npd"],
        npd_steps=summary["steps"]["npd"],
    )
