"""summary.json for programs, summary.txt for the terminal, report.html for people.

Any part of the run may be missing: without NPD, or stopped half way, the same files come out with gaps
that are named.
"""

import json
from collections.abc import Iterable, Mapping, Sequence

from npd_ascend.busy import busy_shares, sync_split
from npd_ascend.config import Config
from npd_ascend.durable import commit_file
from npd_ascend.metrics import read_metrics
from npd_ascend.report.page import render_page
from npd_ascend.report.versions import Version, read_versions
from npd_ascend.runfolder import RunFolder

MODELS = ("start", "sft", "npd", "grpo", "teacher")
_DRIFT = ("heldout/drift", "train/drift")  # on held-out rollouts, or with npd.stream on those that are trained on
TRAINED = ("sft", "npd", "grpo")  # stages that train


def write_report(run: RunFolder) -> None:
    """Write RUN/summary.json, RUN/summary.txt and RUN/report.html from what the run folder holds."""
    rows, versions = read_metrics(run.path), read_versions(run)
    summary = summarise(run, rows, versions)
    with commit_file(run.summary) as draft:
        draft.write_text(json.dumps(summary, indent=2) + "\n")
    with commit_file(run.path / "summary.txt") as draft:
        draft.write_text(terminal_table(run.config, summary))
    with commit_file(run.report) as draft:
        draft.write_text(render_page(run, expected_models(run.config), rows, versions, summary), encoding="utf-8")


def summarise(run: RunFolder, rows: Sequence[Mapping], versions: Sequence[Version]) -> dict:
    """The content of summary.json; null where the run has not got so far."""
    evaluations = json.loads(run.evaluations.read_text()) if run.evaluations.exists() else {}
    heldout = [row for row in rows if row["stage"] == "npd" and "heldout/kl_teacher" in row]
    kl = [row["heldout/kl_teacher"] for row in sorted(heldout, key=lambda row: row["time"])]
    steps = {stage: [row for row in rows if row["stage"] == stage and "train/loss" in row] for stage in TRAINED}
    trained = {stage: int(sum(row["train/tokens"] for row in steps[stage])) for stage in TRAINED}
    seconds = stage_seconds(run)
    return {
        "name": run.config.run.name,
        "seed": run.config.run.seed,
        "scores": {name: evaluations.get(name, {}).get("exact_match") for name in MODELS},
        "standard_error": {name: evaluations.get(name, {}).get("standard_error") for name in MODELS},
        "heldout_kl": {"first": kl[0] if kl else None, "last": kl[-1] if kl else None},
        "grpo": grpo_ends(rows),
        "lag": _mean(row["train/lag"] for row in steps["npd"] if "train/lag" in row),  # versions, with npd.stream
        "lag_max": max((row["train/lag_max"] for row in steps["npd"] if "train/lag_max" in row), default=None),
        "drift_max": max((row[name] for row in rows for name in _DRIFT if name in row), default=None),
        "processes": busy_shares(rows),
        "sync": sync_split(rows),
        "canary_max": max((row["rollout/canary"] for row in rows if "rollout/canary" in row), default=None),
        "kept_share": kept_share(versions),
        "kept": {str(version.version): version.kept for version in versions},
        "tokens": {
            "rolled_out": sum(version.rolled_out_tokens for version in versions) + _for_grpo(rows),
            "scored": sum(version.scored_tokens for version in versions),
            "trained": sum(trained.values()),
            "trained_by_stage": trained,
        },
        "steps": {stage: len(steps[stage]) for stage in TRAINED},
        "seconds": seconds,
        "seconds_total": seconds_in_all(run),
        "pack_fill": {stage: _last(rows, stage, "pack/fill") for stage in TRAINED},
    }


def _for_grpo(rows: Sequence[Mapping]) -> int:
    """Answer tokens."""
    return int(sum(row.get("rollout/tokens", 0) for row in rows if row["stage"].startswith("grpo-rollout")))


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def grpo_ends(rows: Sequence[Mapping]) -> dict[str, dict[str, float]] | None:
    """GRPO metric -> mean over the "first" and over the "last" tenth of its steps; None if there is none."""
    found = {}
    for name in sorted({name for row in rows for name in row if name.startswith("grpo/")}):
        values = [row[name] for row in sorted(rows, key=lambda row: row["step"]) if name in row]
        size = max(1, len(values) // 10)
        found[name.removeprefix("grpo/")] = {"first": sum(values[:size]) / size, "last": sum(values[-size:]) / size}
    return found or None


def kept_share(versions: Sequence[Version]) -> float | None:
    """Kept over decided training rollouts, in samples."""
    samples = {"kept": 0, "all": 0}
    for version in versions:
        for reason, count in version.kept.items():
            samples["all"] += count["samples"] if reason != "heldout" else 0
            samples["kept"] += count["samples"] if reason == "kept" else 0
    return samples["kept"] / samples["all"] if samples["all"] else None


def stage_seconds(run: RunFolder) -> dict[str, float]:
    """Wall seconds per stage, in the order of first appearance; a stage that ran in parts is summed,
    but for parts that ended with SIGKILL.

    `report` itself is left out, so that asking twice gives the same answer.
    """
    seconds: dict[str, float] = {}
    for row in _stages(run):
        seconds[row["stage"]] = seconds.get(row["stage"], 0.0) + row["seconds"]
    return seconds


def seconds_in_all(run: RunFolder) -> float:
    """Wall seconds in which any stage ran: those that ran side by side count once."""
    total, end = 0.0, 0.0
    for row in sorted(_stages(run), key=lambda row: row["started"]):
        total += max(0.0, row["started"] + row["seconds"] - max(end, row["started"]))
        end = max(end, row["started"] + row["seconds"])
    return total


def _stages(run: RunFolder) -> list[dict]:
    path, rows = run.logs / "stages.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # torn by a kill
    return [row for row in rows if row["stage"] != "report"]


def terminal_table(config: Config, summary: dict) -> str:
    """What `npd run` prints at its end."""
    lines = [f"{'model':<10}{'exact match':>17}"]
    lines += [f"{name:<10}{_score(summary, name):>17}" for name in expected_models(config)]
    kl, share, tokens = summary["heldout_kl"], summary["kept_share"], summary["tokens"]
    facts = {
        "tokens trained": f"{tokens['trained']:,}" if tokens["trained"] else "-",
        "seconds in stages": f"{summary['seconds_total']:,.0f}" if summary["seconds"] else "-",
    }
    if config.npd:
        change = f"{kl['first']:.3f} -> {kl['last']:.3f} nats/token" if kl["first"] is not None else "-"
        kept = f"{share:.1%} of the training rollouts" if share is not None else "-"
        facts = {"held-out KL to teacher": change, "rollouts kept": kept} | facts
    if grpo := summary["grpo"]:
        changes = {"mean reward": "reward", "groups without signal": "no_signal", "answers not judged": "failed"}
        facts |= {label: _change(grpo[name]) for label, name in changes.items() if name in grpo}
    lines += ["", *(f"{name:<24}{value}" for name, value in facts.items())]
    return "\n".join(lines) + "\n"


def _change(ends: dict[str, float]) -> str:
    return f"{ends['first']:.3f} -> {ends['last']:.3f}"


def expected_models(config: Config) -> list[str]:
    """Those that this run has when it is complete."""
    there = {"start": True, "sft": config.sft, "npd": config.npd, "grpo": config.grpo}
    there["teacher"] = config.teacher and config.teacher.engine == "local"  # a served one only reads
    return [name for name in MODELS if there[name]]


def _score(summary: dict, name: str) -> str:
    score = summary["scores"][name]
    return "-" if score is None else f"{score:.3f} ± {summary['standard_error'][name]:.3f}"


def _last(rows: Sequence[Mapping], stage: str, name: str) -> float | None:
    values = [row[name] for row in rows if row["stage"] == stage and name in row]
    return values[-1] if values else None
