"""The run folder: where everything lies, whose configuration it is, and who is working on it."""

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from npd_ascend.config import Config, dump_config, load_config
from npd_ascend.config_file import override
from npd_ascend.durable import commit_file, keep_first, only_process
from npd_ascend.errors import UserError
from npd_ascend.heartbeat import Heartbeat
from npd_ascend.stream import Stream
from npd_ascend.weights.channel import WeightChannel
from npd_ascend.weights.disk import DiskChannel

if TYPE_CHECKING:
    from npd_ascend.tokenizer import ChatTokenizer

_MAY_CHANGE = re.compile(
    r"(parallel|processes|device|kernels)\..*|\w+\.checkpoint_every_steps"
    r"|evaluate\.(engine|kv_cache_gib|batch_size|every_steps)|rollout\.kv_cache_gib"
)
_log = logging.getLogger(__name__)


class RunFolder:
    """Paths and handles of one run. The layout is a contract; other tools read it.

    part: "" or "grpo", which has a stream and weight versions of its own, so that a number means one thing.
    """

    def __init__(self, config: Config, part: str = ""):
        self.config, self.path, self._part = config, config.run.folder, part
        self.stream = Stream(self.path / part / "stream")
        self.packs = self.path / part / "stream" / "packs.jsonl"
        self.weights: WeightChannel = DiskChannel(self.path / part / "weights")
        self.checkpoints = self.path / "checkpoints"
        self.student = self.path / "student"
        self.logs = self.path / "logs"
        self.summary = self.path / "summary.json"
        self.report = self.path / "report.html"
        self.evaluations = self.path / "evaluations.json"
        self.data = self.path / "data.json"
        self._tokenizer: ChatTokenizer | None = None

    def heartbeat(self, name: str) -> Heartbeat:
        """That of the process `name`, as the supervisor looks for it."""
        return Heartbeat(self.logs / f"{name}.beat")

    def tokenizer(self) -> "ChatTokenizer":
        """The student's, whose fingerprint lies beside the token ids of the stream.

        UserError if it has changed since another process of the run, or an earlier one, has used it, or if the rows
        of a data file have.
        """
        if self._tokenizer:
            return self._tokenizer
        from npd_ascend.tokenizer import ChatTokenizer  # `npd run` itself needs no transformers

        tokenizer, file = ChatTokenizer(self.config.student.path), self.stream.tokenizer
        mine = tokenizer.fingerprint()
        if (kept := keep_first(file, mine + "\n").strip()) != mine:
            raise UserError(
                f"{self.config.student.path}: its tokenizer is not the one that this run began with (fingerprint "
                f"{mine[:12]}, {file} has {kept[:12]}), so the stream's token ids would mean other text; restore "
                f"it, or start again with a new run.folder"
            )
        self.check_data(keep=True)
        self._tokenizer = tokenizer
        return tokenizer

    def check_data(self, *, keep: bool) -> None:
        """UserError if the rows of a data file are not those that the run began with.

        keep: those that are found become them if the run has none yet.
        """
        from npd_ascend.prompts import fingerprints

        found = json.dumps(mine := fingerprints(self.config)) + "\n"
        kept = keep_first(self.data, found) if keep else self.data.read_text() if self.data.exists() else found
        for role, was in json.loads(kept).items():
            if role in mine and mine[role] != was:  # of a stage that the run has not, nobody reads it
                raise UserError(
                    f"{getattr(self.config.data, role).path}: data.{role}: its rows are not those that this run began "
                    f"with (sha256 {mine[role][:12]}, {self.data} has {was[:12]}), so prompt ids would mean other "
                    f"questions; restore the file, or start again with a new run.folder"
                )

    def needs_npd(self) -> None:
        """UserError for a run without NPD."""
        if self.config.npd is None:
            raise UserError(f"{self.path}/config.yaml: no npd section, so there is nothing to roll out or to distil")

    def for_grpo(self) -> "RunFolder":
        """The same run with the stream and the weight versions of GRPO; UserError for a run without it."""
        if self.config.grpo is None:
            raise UserError(f"{self.path}/config.yaml: no grpo section, so there are no problems to answer")
        return RunFolder(self.config, "grpo")

    def generator(self, version: int) -> Path:
        """Folder with the weights that sample `version`; version 0 is the student as given if nothing trained it."""
        trained_before = self.config.sft or (self._part == "grpo" and self.config.npd)
        if version == 0 and not trained_before:
            return self.config.student.path
        return self.weights.fetch(version)

    def after(self, stage: str) -> "RunFolder | None":
        """The part of the run whose version 0 is the student after `stage`; None if that is RUN/student."""
        if stage == "sft" and self.config.npd:
            return RunFolder(self.config)
        return self.for_grpo() if stage != "grpo" and self.config.grpo else None

    def has_trained(self, stage: str) -> bool:
        """Whether sft, npd or grpo has come to its end."""
        following = self.after(stage)
        return 0 in following.weights.versions() if following else self.student.exists()

    def trained(self, stage: str) -> Path:
        """The folder of the student after sft, npd or grpo, its checksum compared where it is a weight version."""
        following = self.after(stage)
        return following.weights.fetch(0) if following else self.student


def worker_name(name: str, worker: int | None) -> str:
    """What a worker's log, lock and metrics are called."""
    return name if worker is None else f"{name}-{worker}"


def open_run(config: Config) -> RunFolder:
    """Make the folder or continue in it; UserError if it belongs to another configuration."""
    run = enter_run(config)
    keep_config(run)
    return run


def enter_run(config: Config) -> RunFolder:
    """The same, but it belongs to this configuration only once that is kept: a check may yet refuse it."""
    run = RunFolder(config)
    for key, old, new in allowed_changes(config):
        _log.warning("%s: goes on with %s=%r instead of %r; equal up to rounding", run.path, key, new, old)
    try:
        run.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.folder: {run.path}: {error.strerror}; set it to a folder that can be made") from None
    if not os.access(run.logs, os.W_OK):
        raise UserError(f"run.folder: {run.path}: it cannot be written; set run.folder to one that can")
    return run


def leave_run(run: RunFolder) -> None:
    """Take away what enter_run, the log and the lock of `npd run` made, if nothing of the run is there."""
    if (run.path / "config.yaml").exists():
        return
    # the lock last: who waits for it makes a log of its own
    for file in (run.logs / "run.log", run.logs / "run.lock"):
        if file.exists() and not file.stat().st_size:
            file.unlink()
    with suppress(OSError):  # something else is in them
        run.logs.rmdir()
        run.path.rmdir()


def keep_config(run: RunFolder) -> None:
    """The configuration as RUN/config.yaml, from which every process of the run reads it."""
    saved, text = run.path / "config.yaml", dump_config(run.config)
    if not saved.exists() or saved.read_text() != text:
        with commit_file(saved) as draft:
            draft.write_text(text)


def allowed_changes(
    config: Config, way_out: str = "set run.folder to a new folder"
) -> list[tuple[str, object, object]]:
    """(key, was, is) of what differs from the run in config.run.folder, empty if there is none yet.

    Only where and how it computes may differ; UserError names what would make it another run, and `way_out`.
    """
    saved = config.run.folder / "config.yaml"
    if not saved.exists():
        return []
    # through Config, so that a key that is newer than the folder has its default
    changes = differences(load_config(saved, [override("run.folder", config.run.folder)]), config)
    if other := [f"{key} was {old!r}, is {new!r}" for key, old, new in changes if not _MAY_CHANGE.fullmatch(key)]:
        raise UserError(f"{saved}: this run was started with another configuration ({'; '.join(other[:3])}); {way_out}")
    return changes


def differences(was: Config, now: Config) -> list[tuple[str, object, object]]:
    """(dotted key, was, is) of every value in which two configurations differ."""
    return list(dict_differences(yaml.safe_load(dump_config(was)), yaml.safe_load(dump_config(now))))


def reopen_run(folder: Path) -> RunFolder:
    """The run whose resolved configuration lies in `folder`, which may have been moved or copied."""
    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder}: no config.yaml, so not a run folder; start one with `npd run --config FILE`")
    return RunFolder(load_config(folder / "config.yaml", [override("run.folder", folder.absolute())]))


@contextmanager
def working_on(run: RunFolder, role: str) -> Iterator[None]:
    """Hold RUN/logs/<role>.lock; UserError if a living process has it. The lock dies with its owner."""
    refusal = f"{run.path}: another `npd {role}` is working on this run; wait for it or stop it"
    with only_process(run.logs / f"{role}.lock", refusal):
        yield


def dict_differences(was, now, key: str = "") -> Iterator[tuple[str, object, object]]:
    """The same of what a configuration file holds; None for a key that one of them lacks."""
    if isinstance(was, dict) and isinstance(now, dict):
        for name in sorted(was.keys() | now.keys()):
            yield from dict_differences(was.get(name), now.get(name), f"{key}.{name}".lstrip("."))
    elif was != now:
        yield key, was, now
