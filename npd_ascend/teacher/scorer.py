"""What a teacher must do: log-probs of given answers. It never decodes.

Dimensions: A answer tokens, K top-k.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """What one prefill says about one answer; nats, full vocabulary."""

    logprob_A: np.ndarray  # float32, of the given tokens
    topk_ids_AK: np.ndarray  # int32
    topk_logprobs_AK: np.ndarray  # float32, falling
    entropy_A: np.ndarray  # float32

    @property
    def loss(self) -> float:
        """Mean token loss of the answer."""
        return -float(self.logprob_A.mean(dtype=np.float64))


class Scorer(Protocol):
    def score(self, rows: Sequence[tuple[Sequence[int], int]], *, top_k: int, pack_tokens: int) -> list[AnswerScore]:
        """The answers of `rows`, (token ids, prompt length) each, in order.

        pack_tokens: about as many tokens are computed together; a longer sample is computed alone.
        """
