"""The figures of the page as inline SVG. Colours are CSS variables, so one drawing serves light and dark."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from npd_ascend.config import FilterConfig
from npd_ascend.report.versions import Version

# Matplotlib draws in these stand-ins; _svg puts the page's variable in the place of each.
_VARIABLES = {
    "#0a0b01": "var(--ink)",
    "#0a0b02": "var(--muted)",
    "#0a0b03": "var(--line)",
    "#0a0b04": "var(--accent)",
    "#0a0b05": "var(--below)",
    "#0a0b06": "var(--above)",
}
INK, MUTED, LINE, ACCENT, BELOW, ABOVE = _VARIABLES
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "path",  # the page must look the same where the fonts are others
    "svg.hashsalt": "npd",  # equal data, equal bytes
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "figure.facecolor": "none",
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}
_REASON_COLOURS = {"kept": ACCENT, "ifd_below_zero": BELOW, "ifd_above_tau": ABOVE}
DRIFT_LIMIT = 0.10  # nats/token, the paper's near-policy zone
_POINTS = 400  # more than that cannot be told apart on the page
_BINS = 60


def loss_curve(rows: Sequence[Mapping], stage: str, refresh_after: Sequence[int] = ()) -> Markup | None:
    """train/loss over the steps of `stage`, a line at every refresh that was reached. None without steps."""
    steps = sorted((row["step"], row["train/epoch"], row["train/loss"]) for row in _with(rows, stage, "train/loss"))
    if not steps:
        return None
    step, epoch, loss = (np.array(column) for column in zip(*steps, strict=True))
    size = steps_per_point(len(step))
    starts = np.arange(0, len(step), size)
    sums = np.add.reduceat(loss, starts)
    counts = np.diff([*starts, len(step)])
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes("optimizer step", "nats/token")
        marker = "o" if len(starts) < 3 else None
        axes.plot(step[starts], sums / counts, color=ACCENT, marker=marker, markersize=4)
        axes.set_xlim(0, max(1, step[-1]))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        first_steps = [step[epoch >= after][0] for after in refresh_after if (epoch >= after).any()]
        _mark_refreshes(axes, first_steps)
        return _svg(figure, f"{stage} training loss over steps")


def steps_per_point(num_steps: int) -> int:
    """How many steps one point of a loss curve averages."""
    return -(-num_steps // _POINTS)


def heldout_curve(
    rows: Sequence[Mapping],
    name: str,
    refresh_after: Sequence[int],
    unit: str = "nats/token",
    limit: float | None = None,
) -> Markup | None:
    """A held-out metric over the epochs of NPD, `limit` as a dashed line. None if it was never measured."""
    # at a refresh two rows have the same epoch: before and after, in the order of time
    measured = sorted(_with(rows, "npd", name), key=lambda row: row["time"])
    if not measured:
        return None
    epoch, value = [row["train/epoch"] for row in measured], [row[name] for row in measured]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes("epoch", unit)
        axes.plot(epoch, value, color=ACCENT, marker="o", markersize=3.5)
        axes.set_ylim(0, 1.15 * max([*value, limit or 0.0]) or 1.0)
        axes.set_xlim(-0.15, max(1, *epoch) + 0.15)
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        if limit is not None:
            axes.axhline(limit, color=ABOVE, linestyle=(0, (4, 3)), linewidth=1.1)
        _mark_refreshes(axes, [after for after in refresh_after if after < epoch[-1]])
        return _svg(figure, f"{name} over epochs")


def step_curve(
    rows: Sequence[Mapping],
    name: str,
    unit: str,
    *,
    stage: str = "npd",
    published: Sequence[float] = (),
    limit: float | None = None,
) -> Markup | None:
    """A metric over the steps of a stage, a dotted line at every publication. None if it was never measured."""
    measured = sorted((row["step"], row[name]) for row in _with(rows, stage, name))
    if not measured:
        return None
    step, value = zip(*measured, strict=True)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes("optimizer step", unit)
        axes.plot(step, value, color=ACCENT, marker="o", markersize=3)
        axes.set_ylim(0, 1.15 * max([*value, limit or 0.0]) or 1.0)
        axes.set_xlim(0, max(1, *step))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if limit is not None:
            axes.axhline(limit, color=ABOVE, linestyle=(0, (4, 3)), linewidth=1.1)
        for place in published:
            axes.axvline(place, color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
        return _svg(figure, f"{name} over steps")


def delta_histogram(version: Version, filters: FilterConfig) -> Markup | None:
    """Δ-IFD of the training rollouts of one version, stacked by reason, with the thresholds that are set."""
    if not version.deltas:
        return None
    low, high = histogram_range(version)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(f"Δ-IFD ({filters.ifd_form} form)", "rollouts")
        # the free filters' rollouts have no Δ-IFD, so three reasons are all that a decided version shows
        reasons = [reason for reason in ("ifd_below_zero", "kept", "ifd_above_tau") if reason in version.deltas]
        axes.hist(
            [np.clip(version.deltas[reason], low, high) for reason in reasons],
            bins=_edges(low, high),
            histtype="stepfilled",  # one outline per reason: no seams between the bars
            stacked=True,
            color=[_REASON_COLOURS[reason] for reason in reasons],
            linewidth=0,
        )
        axes.grid(False, axis="x")
        axes.set_xlim(low, high)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        top = axes.get_ylim()[1]
        axes.set_ylim(0, 1.12 * top)
        ends = [(0.0, "0")] if filters.drop_below_zero else []
        if version.limit is not None:
            named = f"{filters.tau:g}-quantile " if filters.tau_mode == "quantile" else "τ = "
            ends += [(version.limit, f"{named}{version.limit:.3g}")]
        for place, text in ends:
            axes.axvline(place, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
            near_end = place > high - 0.2 * (high - low)
            axes.annotate(
                text,
                (place, 1.12 * top),
                xytext=(-4 if near_end else 4, -2),
                textcoords="offset points",
                ha="right" if near_end else "left",
                va="top",
                fontsize=7.5,
            )
        return _svg(figure, f"Δ-IFD histogram of version {version.version}")


def dots(values: Mapping[str, Sequence[float]], label: str) -> Markup | None:
    """A row per name from the top down: a dot for each value, a line at their mean. None without values."""
    names = [name for name in values if values[name]]
    if not names:
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.0, 0.7 + 0.24 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        for row, name in enumerate(names):
            axes.plot(values[name], [row] * len(values[name]), "o", color=ACCENT, markersize=4, alpha=0.7, mew=0)
            axes.plot([np.mean(values[name])] * 2, [row - 0.3, row + 0.3], color=INK, linewidth=1.4)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(label)
        return _svg(figure, label)


def histogram_range(version: Version) -> tuple[float, float]:
    """Room for both thresholds and for 96 % of the values at least; those beyond stand in the end bins."""
    values = np.concatenate(list(version.deltas.values()))
    low, high = np.quantile(values, [0.02, 0.98])
    low, high = min(low, 0.0), max(high, 1.2 * (version.limit or 0.0))
    margin = 0.04 * max(high - low, 1e-6)
    return float(low - margin), float(high + margin)


def _edges(low: float, high: float) -> list[float]:
    """Bins of equal width with an edge at 0, so that no bar stands on both sides of the threshold."""
    width = (high - low) / _BINS
    return [width * bar for bar in range(math.floor(low / width), math.ceil(high / width) + 1)]


def _with(rows: Sequence[Mapping], stage: str, name: str) -> list[Mapping]:
    return [row for row in rows if row["stage"] == stage and name in row]


def _axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.0, 2.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def _mark_refreshes(axes: Axes, places: Sequence[float]) -> None:
    """A dotted line where the rollouts of version 1, 2, ... come in."""
    low, high = axes.get_xlim()
    for version, place in enumerate(places, 1):
        axes.axvline(place, color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
        near_end = place > high - 0.2 * (high - low)
        axes.annotate(
            f"refresh, v{version}" if len(places) < 4 else f"v{version}",
            (place, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-3 if near_end else 3, -2),
            textcoords="offset points",
            ha="right" if near_end else "left",
            va="top",
            color=MUTED,
            fontsize=7.5,
        )


def _svg(figure: Figure, label: str) -> Markup:
    """The drawing without what the page around it does not need. `label` is for readers that see no picture."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # every figure counts from one; ids are unique in a page
    text = re.sub(r'^<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{label}">', text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return Markup(text)
