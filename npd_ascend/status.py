"""Beside the bar of a live run: one line now and then that says what all its processes did since the line before."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from npd_ascend.busy import busy_shares
from npd_ascend.metrics import parse_rows

EVERY_S = 20.0
# metric -> words for the mean of what was logged
_MEANS = {
    "train/lag": "lag {:.1f}",
    "train/drift": "KL {:.3f}",
    "grpo/reward": "reward {:.3f}",
    "filter/kept": "kept {:.0%}",
    "pack/fill": "packs full {:.0%}",
}
_TOKENS = {"rollout/tokens": "generated", "score/tokens": "scored", "train/tokens": "trained"}
_SYNC = {"publish/busy_s": "publish", "rollout/load_s": "load"}


class Status:
    """Reads what RUN/metrics.jsonl has grown by, whoever wrote it."""

    def __init__(self, run: Path, every_s: float = EVERY_S):
        self._path, self._every_s = run / "metrics.jsonl", every_s
        self._at = self._path.stat().st_size if self._path.exists() else 0
        self._since = time.monotonic()

    def line(self) -> str | None:
        """None before every_s (seconds) are over, or if nobody has done anything."""
        seconds = time.monotonic() - self._since
        if seconds < self._every_s or not self._path.exists():
            return None
        with self._path.open("rb") as file:
            file.seek(self._at)
            whole, _, _ = file.read().rpartition(b"\n")  # a line that is being written is for the next time
        self._at += len(whole) + bool(whole)
        self._since = time.monotonic()
        return describe([*parse_rows(whole.decode())], seconds) or None


def describe(rows: Sequence[Mapping], seconds: float) -> str:
    """Of metrics that were logged in `seconds`; tokens are over all of that time, whoever waited."""
    parts = [words.format(sum(found) / len(found)) for name, words in _MEANS.items() if (found := _values(rows, name))]
    groups = [", ".join(parts)] if parts else []
    tokens = [f"{done} {sum(found) / seconds:,.0f}" for name, done in _TOKENS.items() if (found := _values(rows, name))]
    if tokens:
        groups.append("tokens/s " + ", ".join(tokens))
    shares = []
    for process, spent in busy_shares(rows).items():
        total = spent["busy"] + spent["weights"] + spent["waited"]
        if total:
            shares.append(f"{process} {spent['busy'] / total:.0%}")
    if shares:
        groups.append("busy " + ", ".join(shares))
    sync = []
    for name, what in _SYNC.items():
        if found := [value for value in _values(rows, name) if value]:
            sync.append(f"{what} {sum(found) / len(found):.2f}")
    if sync:
        groups.append("a version, s: " + ", ".join(sync))
    return "; ".join(groups)


def _values(rows: Sequence[Mapping], name: str) -> list[float]:
    return [row[name] for row in rows if name in row]
