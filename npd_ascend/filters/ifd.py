"""Instruction-following difficulty and its difference between teacher and student: pure functions.

IFD(x, y) = s(y|x) / s(y), with s the mean token loss (Cherry_LLM) or the perplexity (Superfiltering);
Δ-IFD = IFD_teacher - IFD_student on the same student answer, kept where 0 <= Δ <= τ (NPD).
"""

import math


def ifd(loss_given: float, loss_alone: float, form: str) -> float:
    """IFD from two mean token losses in nats. form: "loss" or "perplexity". nan where s(y) is zero."""
    if form == "perplexity":
        difference = loss_given - loss_alone
        return math.exp(difference) if difference < 700 else math.inf
    return loss_given / loss_alone if loss_alone > 0 else math.nan


def ifd_reason(delta: float, limit: float | None, *, drop_below_zero: bool) -> str:
    """The decision's reason. Both ends of [0, limit] are kept, as the paper states it; limit None: no upper end."""
    if not math.isfinite(delta) and (limit is not None or drop_below_zero):
        return "ifd_undefined"
    if drop_below_zero and delta < 0:
        return "ifd_below_zero"
    return "kept" if limit is None or delta <= limit else "ifd_above_tau"
