"""The stream of a run, one weight version at a time: counts per reason, Δ-IFD, a few rollouts to look at."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from npd_ascend.filters import REASONS, upper_limit
from npd_ascend.records import Decision, Rollout, Score
from npd_ascend.runfolder import RunFolder

EXAMPLES = 6  # rollouts shown token by token


@dataclass(frozen=True, slots=True)
class Example:
    """One rollout to show. score: None where a free filter came before the teacher."""

    rollout: Rollout
    decision: Decision
    score: Score | None


@dataclass(frozen=True, slots=True)
class Version:
    """What the rollouts of one weight version came to. Tokens are answer tokens."""

    version: int
    rolled_out_tokens: int
    scored_tokens: int
    # held-out rollouts have the reason "heldout"; everything below is empty until the version is decided
    kept: dict[str, dict[str, int]]  # reason -> {"samples", "tokens"}, in the order of REASONS
    deltas: dict[str, np.ndarray]  # reason -> finite Δ-IFD of training rollouts
    limit: float | None  # Δ-IFD above which a rollout goes, if it is the same for all
    examples: list[Example]


def read_versions(run: RunFolder) -> list[Version]:
    """Every version with rollouts, from 0 up. Records of one version are in memory at a time."""
    numbers = {entry.version for entry in run.stream.every() if entry.kind == "rollouts"}
    return [_read_version(run, number) for number in sorted(numbers)]


def _read_version(run: RunFolder, version: int) -> Version:
    rollouts = {rollout.sample_id: rollout for rollout in run.stream.read("rollouts", version)}
    scores = {score.sample_id: score for score in run.stream.read("scores", version)}
    decisions = run.stream.read("decisions", version)
    limit, filters = None, run.config.filters
    # a quantile is taken over the rollouts that are decided together: with npd.stream every shard has one of its own
    if decisions and not (run.config.npd.stream and filters.tau_mode == "quantile"):
        trained_on = [score for name, score in scores.items() if not rollouts[name].heldout]
        limit = upper_limit(trained_on, filters)
    return Version(
        version=version,
        rolled_out_tokens=sum(rollout.answer_len for rollout in rollouts.values()),
        scored_tokens=sum(rollouts[name].answer_len for name in scores),
        kept=_counts(rollouts, decisions),
        deltas=_deltas(decisions),
        limit=limit,
        examples=_examples(rollouts, scores, decisions),
    )


def _counts(rollouts: Mapping[str, Rollout], decisions: Sequence[Decision]) -> dict[str, dict[str, int]]:
    counts = {reason: {"samples": 0, "tokens": 0} for reason in REASONS}
    for decision in decisions:
        counts[decision.reason]["samples"] += 1
        counts[decision.reason]["tokens"] += rollouts[decision.sample_id].answer_len
    return {reason: count for reason, count in counts.items() if count["samples"]}


def _deltas(decisions: Sequence[Decision]) -> dict[str, np.ndarray]:
    deltas: dict[str, list[float]] = defaultdict(list)
    for decision in decisions:
        if decision.reason != "heldout" and decision.ifd_delta is not None and np.isfinite(decision.ifd_delta):
            deltas[decision.reason].append(decision.ifd_delta)
    return {reason: np.array(deltas[reason]) for reason in REASONS if reason in deltas}


def _examples(
    rollouts: Mapping[str, Rollout], scores: Mapping[str, Score], decisions: Sequence[Decision]
) -> list[Example]:
    """The first of every reason, then the second of every reason and so on; stream order, so nothing is hand-picked."""
    by_reason: dict[str, list[Decision]] = defaultdict(list)
    for decision in decisions:
        if decision.reason != "heldout" and len(by_reason[decision.reason]) < EXAMPLES:
            by_reason[decision.reason].append(decision)
    turns = [(place, reason) for reason in by_reason for place in range(len(by_reason[reason]))]
    order = ["kept", *reversed(REASONS)]  # what the teacher dropped says more than what the free filters did
    chosen = sorted(turns, key=lambda turn: (turn[0], order.index(turn[1])))[:EXAMPLES]
    picked = [by_reason[reason][place] for place, reason in sorted(chosen, key=lambda turn: order.index(turn[1]))]
    return [Example(rollouts[d.sample_id], d, scores.get(d.sample_id)) for d in picked]
