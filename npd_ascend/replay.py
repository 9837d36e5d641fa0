"""`npd replay`: another student from a recorded stream. Nothing is generated and the teacher is asked nothing.

The new run folder holds the rollouts and scores of the recorded run, as hard links, its weights of version 0, and
decisions made anew. Then it is a run like any other, whose rollouts and scores are all there.
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from npd_ascend.config import Config, dump_config, load_config
from npd_ascend.config_file import override
from npd_ascend.durable import append_line, commit_folder
from npd_ascend.errors import UserError
from npd_ascend.filters import decide, free_reasons
from npd_ascend.prompts import wanted_shards
from npd_ascend.records import Rollout, Score
from npd_ascend.runfolder import RunFolder, allowed_changes, differences, open_run, reopen_run
from npd_ascend.stream import Stream
from npd_ascend.stream.stream import Entry
from npd_ascend.tokenizer import ChatTokenizer

_MAY_DIFFER = re.compile(
    r"(run|npd|filters|evaluate|parallel|processes|device|kernels)\..*|teacher\.top_k"
    r"|rollout\.(engine|weights|kv_cache_gib|eager)"  # of an engine that has nothing to do
)
_SCHEDULE = re.compile(r"npd\.(stream|overlap)\b.*")  # who generated what, and when
_SHARDS = ("npd.epochs", "run.seed")  # with npd.stream, which shards there are, and of which prompts
_MARK = "replay.json"
# models that a replay shares with the recorded run
_SAME_MODELS = ("start", "sft", "teacher")


def open_replay(source: Path, folder: Path, overrides: Sequence[str]) -> RunFolder:
    """The run in `folder`, made of the recorded run in `source` with `overrides`, or continued.

    UserError for settings that want other samples than were recorded, and for a folder that holds something else.
    """
    recorded, config, changes = plan_replay(source, folder, overrides)
    if not folder.exists():
        with commit_folder(folder) as draft:
            _fill(draft, recorded, config)
            (draft / "config.yaml").write_text(dump_config(config))
            said = {"source": str(source.absolute()), "changes": changes}
            (draft / _MARK).write_text(json.dumps(said, indent=2) + "\n")
    return open_run(config)


def plan_replay(source: Path, folder: Path, overrides: Sequence[str]) -> tuple[RunFolder, Config, dict[str, list]]:
    """(the recorded run, the configuration of its replay in `folder`, key -> [recorded, replayed] of what changes).

    UserError for settings that want other samples, and for a folder that holds something else; nothing is written.
    """
    if re.match(r"\w+(\.\w+)+=", str(folder)):
        raise UserError(f"{folder}: a setting where the new run folder should be; npd replay --run RUN FOLDER {folder}")
    if folders := [text for text in overrides if text.startswith("run.folder=")]:
        raise UserError(f"{folders[0]}: the new run folder is {folder}, as it was named; remove this")
    recorded = reopen_run(source)
    recorded.needs_npd()
    if recorded.config.grpo:
        raise UserError(
            f"{source}: has a grpo stage, which generates as it trains; a replay takes runs that end with NPD; "
            f"start one without grpo"
        )
    config = load_config(source / "config.yaml", [*overrides, override("run.folder", folder.absolute())])
    changes = {}
    for key, was, now in differences(recorded.config, config):
        fixed = _SCHEDULE.fullmatch(key) or (recorded.config.npd.stream and key in _SHARDS)
        if fixed or not _MAY_DIFFER.fullmatch(key):
            raise UserError(
                f"{key}={now}: the stream of {recorded.path} was recorded with {was}, and a replay generates nothing; "
                f"start a new run for it"
            )
        if key != "run.folder":
            changes[key] = [was, now]
    if config.teacher.top_k > recorded.config.teacher.top_k:
        raise UserError(
            f"teacher.top_k={config.teacher.top_k}: {recorded.path} has recorded {recorded.config.teacher.top_k}; "
            f"lower it"
        )
    _check_folder(folder, source, config)
    return recorded, config, changes


def _check_folder(folder: Path, source: Path, config: Config) -> None:
    """That it is new, or the same replay."""
    if not folder.exists():
        return
    if not (folder / _MARK).exists():
        raise UserError(f"{folder}: there already, and no replay; name a new folder")
    if (was := json.loads((folder / _MARK).read_text())["source"]) != str(source.absolute()):
        raise UserError(f"{folder}: a replay of {was}, not of {source.absolute()}; name a new folder")
    allowed_changes(config, "name a new folder")


def _fill(draft: Path, recorded: RunFolder, config: Config) -> None:
    stream = Stream(draft / "stream")
    stream.folder.mkdir()
    if recorded.stream.tokenizer.exists():  # its first process compares
        shutil.copy(recorded.stream.tokenizer, stream.tokenizer)
    if recorded.data.exists():
        shutil.copy(recorded.data, draft / recorded.data.name)
    tokenizer = ChatTokenizer(config.student.path)
    if config.npd.stream:
        wanted = range(len(wanted_shards(config, tokenizer)))
        entries = [_recorded(recorded, recorded.stream.shards(kind), wanted, kind) for kind in ("rollouts", "scores")]
        for rollouts, scores in zip(*entries, strict=True):
            _link(recorded, stream, [rollouts, scores])
            _decide(recorded, stream, config, [rollouts], [scores], rollouts.shard)
    else:
        for phase in config.npd.phases:
            number = phase.number
            wanted = range(len(wanted_shards(config, tokenizer, number)))
            rollouts, scores = (
                _recorded(recorded, recorded.stream.entries(kind, number), wanted, f"{kind} of set {number}")
                for kind in ("rollouts", "scores")
            )
            _link(recorded, stream, [*rollouts, *scores])
            _decide(recorded, stream, config, rollouts, scores, 0)
    if config.sft:
        shutil.copytree(recorded.weights.fetch(0), draft / "weights" / "v0", copy_function=_link_or_copy)
    _take_evaluations(draft, recorded, config)


def _recorded(recorded: RunFolder, entries: dict[int, Entry], wanted: range, what: str) -> list[Entry]:
    if missing := [shard for shard in wanted if shard not in entries]:
        raise UserError(
            f"{recorded.stream.folder}: {len(missing)} of {len(wanted)} shards of {what} are not recorded; finish "
            f"`npd run --run {recorded.path}`, or set npd.refresh_after to no more refreshes than it has"
        )
    return [entries[shard] for shard in wanted]


def _link(recorded: RunFolder, stream: Stream, entries: Sequence[Entry]) -> None:
    for entry in entries:
        _link_or_copy(recorded.stream.folder / entry.file, stream.folder / entry.file)
        append_line(stream.manifest, entry.line())


def _decide(
    recorded: RunFolder,
    stream: Stream,
    config: Config,
    rollout_shards: Sequence[Entry],
    score_shards: Sequence[Entry],
    shard: int,
) -> None:
    """Decisions on all these shards together, as the scoring stage makes them, in one shard."""
    rollouts: list[Rollout] = [row for entry in rollout_shards for row in recorded.stream.read_shard(entry)]
    scored: list[Score] = [row for entry in score_shards for row in recorded.stream.read_shard(entry)]
    dropped = free_reasons(rollouts, config.filters, config.npd.pack_tokens)
    scores = {score.sample_id: score for score in scored}
    unknown = [row for row in rollouts if row.sample_id not in dropped and row.sample_id not in scores]
    if unknown:
        raise UserError(
            f"filters: {len(unknown)} rollouts pass them that were dropped in {recorded.path} before the teacher was "
            f"asked, such as {unknown[0].sample_id}; make the filters that need no teacher as strict as they were"
        )
    decisions = decide(rollouts, scores, dropped, config.filters)
    stream.commit("decisions", rollout_shards[0].version, shard, decisions)


def _take_evaluations(draft: Path, recorded: RunFolder, config: Config) -> None:
    """Those of models that both runs share, so that only the new student has to be asked."""
    if not recorded.evaluations.exists() or config.evaluate != recorded.config.evaluate:
        return
    known = json.loads(recorded.evaluations.read_text())
    same = {name: known[name] for name in _SAME_MODELS if name in known}
    (draft / recorded.evaluations.name).write_text(json.dumps(same, indent=2) + "\n")


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    """Committed files are replaced and never written to, so one file may stand in both folders."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
