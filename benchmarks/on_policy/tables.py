"""Rows of vs_on_policy.py as tables, as a plot, and against what the machine can do at best."""

import math
from pathlib import Path

from on_policy.rows import Pair

TARGET = 8.1  # arXiv 2605.05940
RACE = "race: "
PARTS = ("generation", "teacher", "student", "other")  # of clock.py, which needs torch


def per_hour(row: dict) -> float:
    return 3600 * row["passes"] / row["seconds"]


def rows_table(rows: dict[str, dict]) -> str:
    """Rates, and where the time of 100 gradient passes goes."""
    lines = [
        "| row | dtype | passes | samples/h | train only, tokens/s | seconds per 100 passes: "
        + " | ".join(PARTS)
        + " | processor s per 100 | peak, GB | load before |",
        "|" + "---|" * 12,
    ]
    for name, row in rows.items():
        if "passes" not in row:
            continue
        split = [f"{100 * row['split'][part] / row['passes']:.3g}" for part in PARTS]
        cells = [name, str(row["dtype"] or "float32, autocast"), str(row["passes"]), f"{per_hour(row):,.0f}"]
        cells += [f"{row['tokens'] / row['split']['student']:,.0f}", *split]
        cells += [f"{100 * sum(row['cpu_split'].values()) / row['passes']:.3g}", f"{row['peak_gb']:.1f}"]
        cells += [f"{row['load_before']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    rates = rows["rates"]
    machine = ", ".join(f"{key} {rates[key]:.0f}" for key in rates if key.endswith(("gflops", "gb_s")))
    versions = {k: v for row in rows.values() for k, v in row.get("versions", {}).items()}
    packages = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return "\n".join([*lines, "", f"{rates['processors']} threads; {machine}; {packages}. {_seen(rows)}"])


def _seen(rows: dict[str, dict]) -> str:
    measured = [share for row in rows.values() for share in row.get("changed_in_bf16", [])]
    expected = ", ".join(f"{100 * share:.1f}% at lr {lr}" for lr, share in rows["rates"]["seen_in_bf16"].items())
    found = f"measured in the first updates {100 * min(measured):.0f} to {100 * max(measured):.0f}%" if measured else ""
    return f"Weights that one update changes in bfloat16, expected of steps as long as lr: {expected}; {found}."


def race_table(rows: dict[str, dict], start: str) -> str:
    """Seconds to the lowest divergence that TRL reaches, for every contestant."""
    opponent, level = strongest(rows)
    if level >= rows[start]["kl"]:
        return "No race: after so few passes TRL is no nearer to the teacher than before."
    name = opponent.removeprefix(RACE)
    lines = [
        f"Held-out KL(teacher || student), nats/token: {rows[start]['kl']:.3f} before, {level:.3f} at best by {name}.",
        "",
        f"| contestant | passes | seconds | KL at the end | lowest | s to {level:.3f} | times as fast as {name} |",
        "|" + "---|" * 7,
    ]
    reached = {name: seconds_to(row, level, rows[start]["kl"]) for name, row in _racing(rows).items()}
    for name, row in _racing(rows).items():
        never = math.isinf(reached[name])
        cells = [name.removeprefix(RACE), str(row["passes"]), f"{row['seconds']:.3g}", f"{row['saved'][-1]['kl']:.3f}"]
        cells += [f"{lowest(row):.3f}"]
        cells += ["–", "–"] if never else [f"{reached[name]:.3g}", f"{reached[opponent] / reached[name]:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _racing(rows: dict[str, dict]) -> dict[str, dict]:
    return {name: row for name, row in rows.items() if name.startswith(RACE)}


def at_best_rate(rows: dict[str, dict]) -> dict[str, dict]:
    """Of every contestant the learning rate that brings it nearest to the teacher."""
    best: dict[str, str] = {}
    for name, row in _racing(rows).items():
        contestant = name.partition(", lr ")[0]
        if contestant not in best or lowest(row) < lowest(rows[best[contestant]]):
            best[contestant] = name
    return {name: rows[name] for name in best.values()}


def lowest(row: dict) -> float:
    return min(saved["kl"] for saved in row["saved"])


def strongest(rows: dict[str, dict]) -> tuple[str, float]:
    """(contestant of TRL, KL): the one that comes nearest to the teacher, and how near."""
    best = {name: lowest(row) for name, row in _racing(rows).items() if row["trainer"]}
    name = min(best, key=lambda name: best[name])
    return name, best[name]


def seconds_to(row: dict, level: float, start_kl: float) -> float:
    """When the line through the measured points first comes down to `level`."""
    before = (0.0, start_kl)
    for saved in row["saved"]:
        if saved["kl"] <= level:
            fall = before[1] - saved["kl"]
            share = (before[1] - level) / fall if fall > 0 else 1.0
            return before[0] + share * (saved["seconds"] - before[0])
        before = (saved["seconds"], saved["kl"])
    return math.inf


def bounds_table(rows: dict[str, dict], pair: Pair) -> str:
    """Each stage of the race against its floor, at the pair's learning rate."""
    lines = ["| contestant | stage | s per pass | floor | floor / measured |", "|---|---|---|---|---|"]
    for name, row in _racing(rows).items():
        if row["lr"] != pair.lr:
            continue
        for stage, floor in floors(row, rows["rates"], pair).items():
            measured = row["split"][stage] / row["passes"]
            share = f"{floor / measured:.2f}" if measured else "–"
            lines.append(f"| {name.removeprefix(RACE)} | {stage} | {measured:.3g} | {floor:.3g} | {share} |")
    return "\n".join([*lines, "", *_verdict(rows, pair)])


def floors(row: dict, rates: dict, pair: Pair) -> dict[str, float]:
    """Seconds per gradient pass; attention, norms and softmax count as no work at all.

    Products at the GEMM rate; weights read for every token that a batch generates, at the reading bandwidth; an update
    reads and writes masters and two moments, writes and reads gradients: 32 bytes a weight at the copying bandwidth.
    """
    tokens, answers = row["tokens"] / row["passes"], row["answer_tokens"] / row["passes"]
    dtype = row["dtype"] or "float32"
    flops_per_s, generated = 1e9 * rates[f"{dtype}_gflops"], row["generated"] / row["passes"]
    multiplied = {role: rates[role]["body"] * tokens + rates[role]["head"] * answers for role in ("teacher", "student")}
    together = row["settings"].get("per_device_train_batch_size") or row["settings"]["set"] or pair.prompts
    weight_bytes = sum(rates["student"].values()) * (2 if dtype == "bfloat16" else 4)
    traffic_s = weight_bytes * answers / together / (1e9 * rates["read_gb_s"])
    update_s = 32 * sum(rates["student"].values()) / (1e9 * rates["copy_gb_s"]) * row["updates"] / row["passes"]
    return {
        "generation": generated * max(2 * multiplied["student"] / flops_per_s, traffic_s),
        "teacher": generated * 2 * multiplied["teacher"] / flops_per_s,
        "student": 6 * multiplied["student"] / flops_per_s + update_s,
    }


def _verdict(rows: dict[str, dict], pair: Pair) -> list[str]:
    npd = next(row for row in _racing(rows).values() if row["settings"].get("loss") == "tail" and row["lr"] == pair.lr)
    opponent = max((row for row in _racing(rows).values() if row["trainer"]), key=per_hour)
    step, floor = npd["split"]["student"] / npd["passes"], floors(npd, rows["rates"], pair)
    measured_s = opponent["seconds"] / opponent["passes"]
    return [
        f"In the race the faster of TRL makes {per_hour(opponent):,.0f} samples/h, NPD with the tail "
        f"{per_hour(npd):,.0f}, {per_hour(npd) / per_hour(opponent):.2f} times as many.",
        f"The faster of TRL in the race takes {measured_s:.3g} s per gradient pass; {TARGET} times as fast would be "
        f"{measured_s / TARGET:.3g} s. NPD's student step alone takes {step:.3g} s, at its floor "
        f"{floor['student']:.3g} s; with every stage at its floor NPD would take {sum(floor.values()):.3g} s, "
        f"{measured_s / sum(floor.values()):.2f} times as fast as that opponent as measured.",
    ]


def draw(rows: dict[str, dict], start: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.set_prop_cycle(color=[*plt.colormaps["Dark2"].colors])
    for name, row in at_best_rate(rows).items():
        points = [(0.0, rows[start]["kl"]), *((saved["seconds"], saved["kl"]) for saved in row["saved"])]
        dashes = "--" if row["trainer"] else "-"
        axes.plot(*zip(*points, strict=True), dashes, marker="o", markersize=4, label=name.removeprefix(RACE))
    axes.axhline(strongest(rows)[1], color="0.7", linewidth=0.8, zorder=0)
    axes.set_xlabel("seconds of wall time")
    axes.set_ylabel("held-out KL(teacher || student), nats/token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)
