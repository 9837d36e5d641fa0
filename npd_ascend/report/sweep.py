"""What a sweep found: sweep.json for programs, sweep.md for the terminal and for documents, sweep.html for people."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from npd_ascend.durable import commit_file
from npd_ascend.report.plots import dots
from npd_ascend.report.template import load_template


@dataclass(frozen=True, slots=True)
class Outcome:
    """The last measurement of one replay or run; None where it has none."""

    variant: str
    seed: int
    sft: float | None  # share of held-out prompts answered right after that stage
    npd: float | None
    grpo: float | None
    heldout_kl: float | None  # nats/token, to the teacher's top-k; for all replays of a run on the same answers
    drift_max: float | None  # nats/token, KL(current || generator)
    lag: float | None  # versions by which generators were behind, mean over the steps of a stream
    kept_share: float | None  # of the training rollouts
    npd_tokens: int  # trained on
    npd_steps: int


# field, its heading, digits; a column without any value is left out
_COLUMNS = (
    ("sft", "exact match after SFT", 3),
    ("npd", "after NPD", 3),
    ("grpo", "after GRPO", 3),
    ("heldout_kl", "held-out KL, nats/token", 4),
    ("drift_max", "largest drift, nats/token", 3),
    ("lag", "mean lag, versions", 1),
    ("kept_share", "kept", 3),
    ("npd_steps", "steps of NPD", 0),
)
_DRAWN = {"npd": "exact match after NPD", "grpo": "exact match after GRPO", "heldout_kl": "held-out KL, nats/token"}
_DRAWN_OF_SFT = {"sft": "exact match after SFT"}  # where nothing came after it


def write_sweep_report(
    folder: Path, origin: str, variants: Mapping[str, Sequence[str]], outcomes: Sequence[Outcome]
) -> None:
    """origin: what all of them come from. variants: name -> overrides, in the order of the table."""
    with commit_file(folder / "sweep.json") as draft:
        draft.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n")
    columns = [column for column in _COLUMNS if any(getattr(outcome, column[0]) is not None for outcome in outcomes)]
    headings = ["variant", "settings", *(heading for _, heading, _ in columns)]
    rows = [
        [
            name,
            " ".join(overrides) or "as it is",
            *(_mean(_values(outcomes, name, field), digits) for field, _, digits in columns),
        ]
        for name, overrides in variants.items()
    ]
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]
    with commit_file(folder / "sweep.md") as draft:
        draft.write_text("\n".join([*lines, "", f"{_said(outcomes)} {origin}"]) + "\n")
    figures = _figures(_DRAWN, variants, outcomes) or _figures(_DRAWN_OF_SFT, variants, outcomes)
    with commit_file(folder / "sweep.html") as draft:
        page = load_template("sweep.html.j2").render(
            origin=origin, headings=headings, rows=rows, figures=figures, said=_said(outcomes)
        )
        draft.write_text(page, encoding="utf-8")


def _figures(drawn: Mapping[str, str], variants: Iterable[str], outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    """(heading, SVG) of every field that has values."""
    pictures = {
        heading: dots({name: _values(outcomes, name, field) for name in variants}, heading)
        for field, heading in drawn.items()
    }
    return [(heading, picture) for heading, picture in pictures.items() if picture]


def _values(outcomes: Sequence[Outcome], variant: str, field: str) -> list[float]:
    values = (getattr(outcome, field) for outcome in outcomes if outcome.variant == variant)
    return [value for value in values if value is not None]


def _mean(values: Sequence[float], digits: int) -> str:
    """With the standard deviation over seeds where it says anything."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):,.{digits}f}"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean} ± {spread:.{digits}f}" if spread else mean


def _said(outcomes: Sequence[Outcome]) -> str:
    seeds = sorted({outcome.seed for outcome in outcomes})
    if len(seeds) == 1:
        return f"One seed ({seeds[0]}): no spread is known."
    return f"Mean ± standard deviation over {len(seeds)} seeds ({', '.join(map(str, seeds))})."
