"""A model's scores beside the published ones: results.json for programs, a table for the terminal, results.html."""

import json
import textwrap
from collections.abc import Mapping
from dataclasses import asdict

from npd_ascend.durable import commit_file
from npd_ascend.evaluate.benchmarks import BENCHMARKS, PUBLISHED
from npd_ascend.evaluate.scores import Score
from npd_ascend.evaluate.settings import EvalSettings
from npd_ascend.report.template import load_template

_NOTES = (
    "Percent; in brackets Wilson's 95% interval over the questions. An average stands only where all eleven were "
    "asked in full. Published figures are quoted, not measured here; shots and prompts behind them are not published, "
    "and empty cells were not found."
)


def write_results(settings: EvalSettings, scores: Mapping[str, Score], model: dict, lm_eval_version: str) -> None:
    """FOLDER/results.json and FOLDER/results.html."""
    results = {
        "model": settings.model.name,
        "path": str(settings.model.path),
        "files": model,
        "lm_eval": lm_eval_version,
        "seed": settings.seed,
        "settings": settings.model.model_dump(mode="json", exclude={"path", "name"}),
        "benchmarks": {name: _result(settings, name, score) for name, score in scores.items()},
        "average": average(settings, scores),
        "published": [asdict(row) for row in PUBLISHED],
    }
    with commit_file(settings.folder / "results.json") as draft:
        draft.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with commit_file(settings.folder / "results.html") as draft:
        draft.write_text(_page(settings, scores), encoding="utf-8")


def average(settings: EvalSettings, scores: Mapping[str, Score]) -> float | None:
    """Of the eleven, in 0..1; None if one of them is missing or only some of its questions were asked."""
    cut = any(chosen.questions for _, chosen in settings.benchmarks.asked())
    return None if cut or len(scores) < len(BENCHMARKS) else sum(s.mean for s in scores.values()) / len(scores)


def terminal_table(settings: EvalSettings, scores: Mapping[str, Score]) -> str:
    head = ["benchmark", "metric", settings.model.name, *(row.name for row in PUBLISHED)]
    lines = [head, *_cells(settings, scores)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = "\n".join(
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    trials = [
        f"{BENCHMARKS[name].title}: {score.questions} questions only"
        for name, score in scores.items()
        if getattr(settings.benchmarks, name).questions
    ]
    return "\n".join([text, "", *textwrap.wrap(_NOTES, 100), *trials])


def _result(settings: EvalSettings, name: str, score: Score) -> dict:
    benchmark, chosen = BENCHMARKS[name], getattr(settings.benchmarks, name)
    return {
        "score": score.mean,
        "interval_95": [score.low, score.high],
        "questions": score.questions,
        "samples": score.samples,
        "task": benchmark.task,
        "metric": benchmark.metric,
        "filter": benchmark.filter,
        "changes": benchmark.named_changes,
        **chosen.model_dump(mode="json", exclude={"samples", "questions"}),
        "first_questions_only": chosen.questions,
    }


def _cells(settings: EvalSettings, scores: Mapping[str, Score]) -> list[list[str]]:
    rows = []
    for name, benchmark in BENCHMARKS.items():
        own = ""
        if score := scores.get(name):
            own = f"{100 * score.mean:.2f} ({100 * score.low:.1f}–{100 * score.high:.1f})"
        rows.append([benchmark.title, benchmark.named, own, *(_percent(row.scores.get(name)) for row in PUBLISHED)])
    mean = average(settings, scores)
    own = _percent(None if mean is None else 100 * mean)
    return [*rows, ["average", "of the eleven", own, *(_percent(row.average) for row in PUBLISHED)]]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _page(settings: EvalSettings, scores: Mapping[str, Score]) -> str:
    return load_template("benchmarks.html.j2").render(
        name=settings.model.name,
        published=PUBLISHED,
        rows=_cells(settings, scores),
        asked=[(BENCHMARKS[name].title, _result(settings, name, score)) for name, score in scores.items()],
        notes=_NOTES,
    )
