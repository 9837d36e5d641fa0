"""Which rollouts are trained on: free filters before the teacher is asked, Δ-IFD after."""

from collections.abc import Mapping, Sequence

import numpy as np

from npd_ascend.config import FilterConfig
from npd_ascend.filters.ifd import ifd, ifd_reason
from npd_ascend.filters.simple import free_reasons
from npd_ascend.records import Decision, Rollout, Score

__all__ = ["REASONS", "decide", "free_reasons", "upper_limit"]

# Every reason a decision can carry, in the order in which they are tried, with the setting that it hangs on.
REASONS = {
    "heldout": "held-out prompt: evaluated, never trained on",
    "truncated": "cut at max_new_tokens (filters.drop_truncated)",
    "too_short": "fewer than filters.min_answer_tokens",
    "too_long": "more than filters.max_tokens, or than npd.pack_tokens",
    "repetition": "repeats itself above filters.max_repetition",
    "duplicate": "same answer to the same prompt stands earlier; rollout.temperature tells answers apart",
    "ifd_undefined": "s(y) is zero, or its perplexity overflows: one of the two forms of filters.ifd_form has no value",
    "ifd_below_zero": "Δ-IFD < 0, the student is less sure of its own answer than the teacher: filters.drop_below_zero",
    "ifd_above_tau": "Δ-IFD above the limit of filters.tau: sure student, surprised teacher",
    "kept": "trained on",
}


def decide(
    rollouts: Sequence[Rollout], scores: Mapping[str, Score], dropped: Mapping[str, str], filters: FilterConfig
) -> list[Decision]:
    """One decision per rollout, in order. `dropped`: reasons of the free filters, by sample id."""
    trained_on = [scores[r.sample_id] for r in rollouts if r.sample_id not in dropped and not r.heldout]
    limit = upper_limit(trained_on, filters)
    decisions = []
    for rollout in rollouts:
        score = scores.get(rollout.sample_id)
        student = teacher = delta = None
        if score is not None:
            student = ifd(score.student_loss, score.student_loss_alone, filters.ifd_form)
            teacher = ifd(score.teacher_loss, score.teacher_loss_alone, filters.ifd_form)
            delta = teacher - student
        if rollout.heldout:
            reason = "heldout"
        elif rollout.sample_id in dropped:
            reason = dropped[rollout.sample_id]
        else:
            reason = ifd_reason(delta, limit, drop_below_zero=filters.drop_below_zero)
        decisions.append(
            Decision(
                sample_id=rollout.sample_id,
                weight_version=rollout.weight_version,
                kept=reason == "kept",
                reason=reason,
                ifd_teacher=teacher,
                ifd_student=student,
                ifd_delta=delta,
            )
        )
    return decisions


def upper_limit(scores: Sequence[Score], filters: FilterConfig) -> float | None:
    """Δ-IFD above which a sample goes: τ itself, or the τ-quantile of the Δ of `scores` that are finite and above
    the lower limit; None without τ."""
    if filters.tau is None or filters.tau_mode == "absolute":
        return filters.tau
    deltas = [
        ifd(s.teacher_loss, s.teacher_loss_alone, filters.ifd_form)
        - ifd(s.student_loss, s.student_loss_alone, filters.ifd_form)
        for s in scores
    ]
    inside = [delta for delta in deltas if np.isfinite(delta) and (delta >= 0 or not filters.drop_below_zero)]
    # "lower": the limit is a sample's own value, so the kept share is τ up to one sample
    return float(np.quantile(inside, filters.tau, method="lower")) if inside else 0.0
