"""Does the teacher know anything, and does it agree with itself? Asked before anything is trained on it."""

import math
from collections.abc import Sequence

import numpy as np

from npd_ascend.errors import UserError
from npd_ascend.records import Prompt, Score
from npd_ascend.teacher.scorer import Scorer
from npd_ascend.tokenizer import ChatTokenizer

# A model that knows nothing is at ln V nats; a useful one is far below.
UNTRAINED_SHARE = 0.9
# Two packings of the same question may differ by rounding only.
SELF_TOLERANCE_NATS = {"float32": 1e-3, "bfloat16": 0.25}


def check_teacher(
    scorer: Scorer,
    prompts: Sequence[Prompt],
    tokenizer: ChatTokenizer,
    *,
    dtype: str,
    vocab_size: int,
    pack_tokens: int,
    name: str,
) -> str:
    """One line that says what was found; UserError if the teacher must not be used.

    prompts: held-out prompts; those with a reference answer are used, at most 64. `name`: the teacher's
    folder or server, for messages. Without reference answers only the entropy on rollouts (check_scores) speaks.
    """
    rows = [
        (p.token_ids + tokenizer.encode_answer(p.answer), len(p.token_ids)) for p in prompts if p.answer is not None
    ][:64]
    if not rows:
        return "teacher: no reference answers to check it on; its entropy on rollouts is checked instead"
    together = scorer.score(rows, top_k=1, pack_tokens=pack_tokens)
    alone = scorer.score(rows[:8], top_k=1, pack_tokens=1)
    gap = max(float(np.abs(a.logprob_A - b.logprob_A).max()) for a, b in zip(alone, together, strict=False))
    if not gap <= SELF_TOLERANCE_NATS[dtype]:
        raise UserError(
            f"{name}: the teacher disagrees with itself by {gap:.3g} nats between two packings of the same answers "
            f"(tolerance {SELF_TOLERANCE_NATS[dtype]}); its targets cannot be trusted"
        )
    loss = -float(np.concatenate([score.logprob_A for score in together]).mean(dtype=np.float64))
    _refuse_untrained(loss, vocab_size, name, f"loss on {len(rows)} reference answers")
    nothing = math.log(vocab_size)
    return f"teacher: {loss:.3f} nats/token on {len(rows)} reference answers (knowing nothing is {nothing:.2f})"


def check_scores(scores: Sequence[Score], vocab_size: int, name: str) -> None:
    """UserError if the teacher is not finite on some rollout, or near uniform on all of them together."""
    for score in scores:
        finite_A = np.isfinite(score.teacher_logprob) & np.isfinite(score.teacher_topk_logprobs).all(-1)
        if not (finite_A.all() and np.isfinite(score.teacher_entropy)):
            raise UserError(
                f"{name}: {score.sample_id}: the teacher's log-probs are not numbers at {(~finite_A).sum()} of "
                f"{len(finite_A)} tokens: damaged weights, or an overflow in teacher.dtype. Nothing was trained on it"
            )
    tokens = np.array([len(score.teacher_logprob) for score in scores])
    entropy = float((np.array([score.teacher_entropy for score in scores]) * tokens).sum() / tokens.sum())
    _refuse_untrained(entropy, vocab_size, name, f"entropy on {len(scores)} rollouts")


def _refuse_untrained(nats: float, vocab_size: int, name: str, what: str) -> None:
    limit = UNTRAINED_SHARE * math.log(vocab_size)
    if not nats <= limit:
        raise UserError(
            f"{name}: the teacher's {what} is {nats:.2f} nats/token, and a model that knows nothing has "
            f"ln({vocab_size}) = {math.log(vocab_size):.2f} (limit {limit:.2f}); are these the weights you meant? "
            f"Nothing was trained on it"
        )
