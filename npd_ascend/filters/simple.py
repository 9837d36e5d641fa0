"""Filters that need no model: truncation, length, repetition, duplicates."""

from collections.abc import Sequence

from npd_ascend.config import FilterConfig
from npd_ascend.records import Rollout

NGRAM = 8


def free_reasons(rollouts: Sequence[Rollout], filters: FilterConfig, pack_tokens: int) -> dict[str, str]:
    """sample_id -> reason, for the rollouts that are dropped before the teacher is asked.

    Held-out rollouts are never dropped: they measure. Of equal answers to one prompt the first stays.
    """
    limit = filters.max_tokens or pack_tokens
    seen: set[tuple[str, tuple[int, ...]]] = set()
    dropped = {}
    for rollout in rollouts:
        if rollout.heldout:
            continue
        key = (rollout.prompt_id, rollout.token_ids)
        if filters.drop_truncated and rollout.finish_reason == "length":
            dropped[rollout.sample_id] = "truncated"
        elif rollout.answer_len < filters.min_answer_tokens:
            dropped[rollout.sample_id] = "too_short"
        elif len(rollout.token_ids) > limit:
            dropped[rollout.sample_id] = "too_long"
        elif repetition(rollout.token_ids[rollout.prompt_len :]) > filters.max_repetition:
            dropped[rollout.sample_id] = "repetition"
        elif key in seen:
            dropped[rollout.sample_id] = "duplicate"
        seen.add(key)
    return dropped


def repetition(answer: Sequence[int]) -> float:
    """Share of the answer's 8-grams that stood in it before; 0 for an answer shorter than that."""
    grams = [tuple(answer[i : i + NGRAM]) for i in range(len(answer) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
