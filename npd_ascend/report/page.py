"""report.html: one page that needs nothing but itself. The layout is in page.html.j2, the numbers come from here."""

import shlex
import time
from collections.abc import Mapping, Sequence

import numpy as np

from npd_ascend.config import dump_config
from npd_ascend.errors import UserError
from npd_ascend.filters import REASONS
from npd_ascend.records import Decision
from npd_ascend.report import plots
from npd_ascend.report.template import load_template
from npd_ascend.report.versions import Example, Version
from npd_ascend.runfolder import RunFolder
from npd_ascend.tokenizer import ChatTokenizer

SHOWN_TOKENS = 80  # of an answer
SHOWN_CHARACTERS = 1500  # of a prompt
SHOWN_VERSIONS = 4
FULL_COLOUR_NATS = 5.0  # |teacher - student| from which on a token has the full colour
MODEL_NAMES = {"start": "start", "sft": "after SFT", "npd": "after NPD", "grpo": "after GRPO", "teacher": "teacher"}
_EXACT_MATCH = "heldout/exact_match"
# throughput metric -> what it counts
_RATES = {
    "rollout/tokens_per_s": "answer tokens generated, per shard",
    "score/tokens_per_s": "tokens through the teacher, per shard",
    "train/tokens_per_s": "tokens trained, per step",
}


def render_page(
    run: RunFolder, models: Sequence[str], rows: Sequence[Mapping], versions: Sequence[Version], summary: dict
) -> str:
    """The page as text. models: those a complete run has; rows: metrics; summary: as in summary.json."""
    examples, examples_missing = _examples(run, versions)
    template = load_template("page.html.j2", count=_count, share=_share, duration=_duration, signed=_signed)
    return template.render(
        config=run.config,
        config_yaml=dump_config(run.config),
        folder=shlex.quote(str(run.path)),  # it stands in commands
        evaluated=run.evaluations.exists(),
        models=_models(models, summary),
        verdict=_verdict(models, summary),
        summary=summary,
        period=_period(rows),
        curves=_curves(run, rows),
        versions=[_version(run, version, _published_steps(rows)) for version in _shown(versions)],
        num_versions=len(versions),
        processes=_processes(summary["processes"]),
        sync=summary["sync"],
        canary_max=summary["canary_max"],
        reasons=_reasons(versions),
        stages=_bars(summary["seconds"]),
        rates=_rates(rows),
        examples=examples,
        examples_missing=examples_missing,
        full_colour_nats=FULL_COLOUR_NATS,
    )


def _verdict(models: Sequence[str], summary: dict) -> str:
    """One line: what training changed, or what is still to be done."""
    scores, kl = summary["scores"], summary["heldout_kl"]
    before, after = ["start", *(name for name in models if name not in ("start", "teacher"))][-2:]
    if scores[after] is not None and scores[before] is not None:
        line = f"Exact match {scores[before]:.3f} → {scores[after]:.3f} by {after.upper()}"
        return f"{line}; the teacher has {scores['teacher']:.3f}." if scores["teacher"] is not None else f"{line}."
    steps = summary["steps"][after]
    if after == "npd" and kl["first"] is not None and steps:
        return f"Held-out KL to the teacher {kl['first']:.3f} → {kl['last']:.3f} nats/token after {steps} NPD steps."
    return f"{after.upper()} has trained {steps:,} steps; nothing is evaluated yet." if steps else "Not trained yet."


def _models(models: Sequence[str], summary: dict) -> list[dict]:
    """Rows of the scores table; `change` is against the row above, for models of this run."""
    rows: list[dict] = []
    for name in models:
        score, error = summary["scores"][name], summary["standard_error"][name]
        above = rows[-1]["score"] if rows and name != "teacher" else None
        change = score - above if score is not None and above is not None else None
        rows.append({"name": name, "label": MODEL_NAMES[name], "score": score, "error": error, "change": change})
    return rows


def _period(rows: Sequence[Mapping]) -> str | None:
    """First and last metric, in local time."""
    if not rows:
        return None
    times = [row["time"] for row in rows]
    first, last = (time.strftime("%Y-%m-%d %H:%M", time.localtime(when)) for when in (min(times), max(times)))
    return f"{first} – {last[11:] if last[:10] == first[:10] else last}"


def _curves(run: RunFolder, rows: Sequence[Mapping]) -> list[dict]:
    """Figures of the training section; figure None where `command` has not run."""
    config, curves = run.config, []
    refreshes = config.npd.refresh_after if config.npd else ()
    for stage, there, command in (("sft", config.sft, "sft"), ("npd", config.npd, "distill")):
        if not there:
            continue
        size = plots.steps_per_point(sum(row["stage"] == stage and "train/loss" in row for row in rows))
        note = f", means of {size} steps" if size > 1 else ""
        what = "cross-entropy on gold answers" if stage == "sft" else _npd_objective(config.npd)
        figure = plots.loss_curve(rows, stage, refreshes if stage == "npd" else ())
        curves.append({"title": f"{stage.upper()} loss", "note": what + note, "figure": figure})
        curves[-1]["command"] = command
        if stage == "sft":
            curves += _exact_match_curve(plots.step_curve(rows, _EXACT_MATCH, "share", stage="sft"), "SFT")
            curves += _answer_curves(rows, "sft")
    if config.npd:
        kl = plots.heldout_curve(rows, "heldout/kl_teacher", refreshes)
        kl_note = "KL(teacher ‖ student) on held-out rollouts of version 0, teacher's top-k"
        curves.append({"title": "Distance to the teacher", "note": kl_note, "figure": kl, "command": "distill"})
        curves += _exact_match_curve(plots.heldout_curve(rows, _EXACT_MATCH, refreshes, "share"), "NPD")
        curves += _answer_curves(rows, "npd")
        curves += _stream_curves(run, rows) if config.npd.stream else [_drift_curve(rows, refreshes)]
    return curves + (_grpo_curves(rows, config.grpo.kl_weight > 0) if config.grpo else [])


def _exact_match_curve(figure, stage: str) -> list[dict]:
    """None where it was not measured: without evaluate.every_steps or without reference answers."""
    note = f"during {stage}: share of prompts whose reference answer greedy decoding gives"
    return [{"title": "Held-out exact match", "note": note, "figure": figure}] if figure else []


def _answer_curves(rows: Sequence[Mapping], stage: str) -> list[dict]:
    """None without evaluate.every_steps."""
    table = [
        ("Held-out answer length", "heldout/answer_tokens", "tokens", "mean over greedy answers"),
        ("Held-out entropy", "heldout/entropy", "nats/token", "of the student at the tokens of its greedy answers"),
    ]
    figures = [plots.step_curve(rows, name, unit, stage=stage) for _, name, unit, _ in table]
    return [
        {"title": title, "note": f"during {stage.upper()}: {note}", "figure": figure}
        for (title, _, _, note), figure in zip(table, figures, strict=True)
        if figure
    ]


def _grpo_curves(rows: Sequence[Mapping], asks_reference: bool) -> list[dict]:
    heldout = _exact_match_curve(plots.step_curve(rows, _EXACT_MATCH, "share", stage="grpo"), "GRPO")
    table = [
        ("Reward", "grpo/reward", "reward", "mean over the answers of a step"),
        ("Groups without signal", "grpo/no_signal", "share", "one and the same reward in the group: not trained on"),
        ("Answer length", "grpo/answer_tokens", "tokens", "mean over the answers of a step"),
        ("Entropy", "grpo/entropy", "nats/token", "estimated: mean −log p of the sampled tokens that are trained on"),
        ("Clipped tokens", "grpo/clipped", "share", "tokens whose ratio to the generator left the clip range"),
    ]
    if asks_reference:
        table.append(("Distance to the start of GRPO", "grpo/kl", "nats/token", "KL(current ‖ start), estimator k3"))
    curves = [
        {"title": title, "note": note, "figure": plots.step_curve(rows, name, unit, stage="grpo"), "command": "grpo"}
        for title, name, unit, note in table
    ]
    return [curves[0], *heldout, *_answer_curves(rows, "grpo"), *curves[1:]]


def _drift_curve(rows: Sequence[Mapping], refreshes: Sequence[int]) -> dict:
    figure = plots.heldout_curve(rows, "heldout/drift", refreshes, limit=plots.DRIFT_LIMIT)
    note = f"KL(current ‖ generator), newest held-out rollouts; dashed: paper's {plots.DRIFT_LIMIT:.2f}"
    return {"title": "Drift from the generator", "note": note, "figure": figure, "command": "distill"}


def _stream_curves(run: RunFolder, rows: Sequence[Mapping]) -> list[dict]:
    stream, published = run.config.npd.stream, sorted(_published_steps(rows).values())
    limit = plots.DRIFT_LIMIT if stream.publish_at_kl is None else stream.publish_at_kl
    drift = plots.step_curve(rows, "train/drift", "nats/token", published=published, limit=limit)
    what = "paper's" if stream.publish_at_kl is None else "publish_at_kl"
    drift_note = f"KL(current ‖ generator) on samples of the step; dotted: new weights; dashed: {what} {limit:.2f}"
    lag = plots.step_curve(rows, "train/lag", "versions", published=published)
    lag_note = f"versions that the samples of a step are behind, mean; at most {stream.max_lag}"
    return [
        {"title": "Drift from the generator", "note": drift_note, "figure": drift, "command": "distill"},
        {"title": "Lag of the generator", "note": lag_note, "figure": lag, "command": "distill"},
    ]


def _published_steps(rows: Sequence[Mapping]) -> dict[int, int]:
    """Weight version -> steps that were done."""
    return {
        int(row["publish/version"]): row["step"] for row in rows if row["stage"] == "npd" and "publish/version" in row
    }


def _npd_objective(npd) -> str:
    return f"{1 - npd.lambda_:.3g} · cross-entropy + {npd.lambda_:.3g} · KL(teacher ‖ student)"


def _shown(versions: Sequence[Version]) -> list[Version]:
    """At most SHOWN_VERSIONS, the first and the last among them."""
    places = np.linspace(0, len(versions) - 1, min(len(versions), SHOWN_VERSIONS)).round().astype(int)
    return [versions[place] for place in places]


def _version(run: RunFolder, version: Version, published: Mapping[int, int]) -> dict:
    """One card of the filter section."""
    config, number, title = run.config, version.version, f"Version {version.version}"
    if not config.npd.stream:
        number = config.npd.generator_of(version.version)
        title = f"Set {version.version}" if config.npd.overlap else title
    if number == 0:
        made_by = "the student after SFT" if config.sft else "the student as given"
    elif config.npd.stream:
        at = f"step {published[number]}" if number in published else "a step that was not logged"  # killed before
        made_by = f"the student after {at}"
    else:
        made_by = f"the student after epoch {config.npd.refresh_after[number - 1]}"
    training = {reason: count for reason, count in version.kept.items() if reason != "heldout"}
    totals = {unit: sum(count[unit] for count in training.values()) for unit in ("samples", "tokens")}
    order = ["kept", *(reason for reason in training if reason != "kept")]
    heldout = version.kept.get("heldout")
    return {
        "number": version.version,
        "title": title,
        "made_by": made_by,
        "figure": plots.delta_histogram(version, config.filters),
        "counts": [{"reason": reason} | training[reason] for reason in order if reason in training],
        "totals": totals,
        "heldout": heldout["samples"] if heldout else 0,
    }


def _reasons(versions: Sequence[Version]) -> dict[str, str]:
    """Meaning of every reason in the tables, in their order."""
    occurring = {reason for version in versions for reason in version.kept}
    return {reason: REASONS[reason] for reason in ("kept", *REASONS) if reason in occurring - {"heldout"}}


def _bars(seconds: Mapping[str, float]) -> list[dict]:
    longest = max(seconds.values(), default=0)
    return [{"stage": name, "seconds": value, "width": value / longest} for name, value in seconds.items()]


def _processes(seconds: Mapping[str, Mapping]) -> list[dict]:
    """Rows of the table of who waited for whom, shares of the time that is accounted for."""
    table = []
    for name, spent in seconds.items():
        total = sum(spent[key] for key in ("busy", "weights", "waited")) or 1.0
        shares = {key: spent[key] / total for key in ("busy", "weights", "waited")}
        table.append({"name": name, "waits_for": spent["waits_for"]} | shares)
    return table


def _rates(rows: Sequence[Mapping]) -> list[dict]:
    """Throughput per stage: median and the middle 80 %."""
    rates: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        for metric in _RATES.keys() & row.keys():
            rates.setdefault((row["stage"], metric), []).append(row[metric])
    return [
        {"stage": stage, "what": _RATES[metric], "count": len(values)}
        | dict(zip(("low", "median", "high"), np.quantile(values, [0.1, 0.5, 0.9]), strict=True))
        for (stage, metric), values in rates.items()
    ]


def _examples(run: RunFolder, versions: Sequence[Version]) -> tuple[list[dict], str | None]:
    """Rollouts of the newest decided version; or none, and why."""
    decided = [version for version in versions if version.examples]
    if not decided:
        return [], "No rollouts are scored yet."
    try:
        tokenizer = ChatTokenizer(run.config.student.path)
    except UserError as error:
        return [], f"The answers cannot be shown as text: {error}"
    return [_example(example, tokenizer) for example in decided[-1].examples], None


def _example(example: Example, tokenizer: ChatTokenizer) -> dict:
    rollout, score = example.rollout, example.score
    prompt = tokenizer.decode_text(rollout.token_ids[: rollout.prompt_len]).strip()
    answer = rollout.token_ids[rollout.prompt_len :][:SHOWN_TOKENS]
    teacher = [None] * len(answer) if score is None else score.teacher_logprob[: len(answer)].tolist()
    student = rollout.logprobs[: len(answer)].tolist()
    return {
        "rollout": rollout,
        "decision": example.decision,
        "ifd": _ifd_text(example.decision),
        "prompt": prompt[:SHOWN_CHARACTERS] + ("…" if len(prompt) > SHOWN_CHARACTERS else ""),
        "tokens": [
            _token(tokenizer.decode_token(token_id), token_id, s, t)
            for token_id, s, t in zip(answer, student, teacher, strict=True)
        ],
        "hidden": rollout.answer_len - len(answer),
    }


def _ifd_text(decision: Decision) -> str:
    if decision.ifd_delta is None:
        return "Δ-IFD not computed"
    if not np.isfinite(decision.ifd_delta):
        return "Δ-IFD undefined"
    return f"Δ-IFD {_signed(decision.ifd_delta)} = {decision.ifd_teacher:.3f} − {decision.ifd_student:.3f}"


def _token(text: str, token_id: int, student: float, teacher: float | None) -> dict:
    """Text, colour and title of one token; log-probs in nats."""
    # line breaks and tabs get signs, and the break itself comes after the token's box
    shown = text.replace("\n", "⏎").replace("\t", "⇥") or "∅"
    title = f"id {token_id} · student {student:.3f} nats · "
    if teacher is None:
        side, strength, title = "unscored", 0.0, f"{title}teacher not asked"
    else:
        difference = teacher - student
        side, strength = "less" if difference < 0 else "more", min(1.0, abs(difference) / FULL_COLOUR_NATS)
        title = f"{title}teacher {teacher:.3f} nats · difference {_signed(difference)}"
    return {"text": shown, "title": title, "side": side, "strength": round(strength, 2), "breaks": text.count("\n")}


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _share(value: float) -> str:
    """Rare is not none: below 0.1 % the first digit is shown."""
    return f"{value:.1%}" if value == 0 or value >= 0.001 else f"{100 * value:.1g}%"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
