"""From the scores of single questions to a benchmark's score and how sure it is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_Z = 1.959963984540054  # 95% of a normal distribution lie within so many standard deviations


@dataclass(frozen=True, slots=True)
class Score:
    """In 0..1. low, high: Wilson's 95% interval over the questions."""

    mean: float
    low: float
    high: float
    questions: int
    samples: int


def score_of(passes: Sequence[Sequence[Mapping]]) -> Score:
    """The mean over all questions and all passes over them, whose rows have a `score`; of groups, over all their tasks.

    The interval is binomial, as if every question were right or wrong, so for F1 and for the mean of several samples it
    is wider than need be: no scores in 0..1 with that mean vary more.
    """
    scores = [row["score"] for rows in passes for row in rows]
    questions = len(passes[0])
    mean = math.fsum(scores) / len(scores)
    low, high = wilson(mean, questions)
    return Score(mean, low, high, questions, len(passes))


def wilson(share: float, count: int) -> tuple[float, float]:
    """95% interval of a binomial proportion (E. B. Wilson, 1927), which has a width at 0 and 1 too."""
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)
