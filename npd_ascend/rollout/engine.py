"""What a generation engine must do: token ids in; token ids, raw log-probs and finish reason out.

The shape is vLLM's: a batch of requests with their own seeds and limits, one sampling rule.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Request:
    token_ids: tuple[int, ...]  # the prompt
    max_new_tokens: int
    seed: int  # draws of this request alone, whatever it is batched with


@dataclass(frozen=True, slots=True)
class Sampling:
    temperature: float  # 0: greedy
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class Completion:
    token_ids: tuple[int, ...]  # the answer, its end token included
    logprobs: np.ndarray  # float32 [A], nats, at temperature 1 over the full vocabulary
    finish_reason: str  # "stop" or "length"


class Engine(Protocol):
    separable: bool  # whether a part of a batch may be asked for alone; else its answers would have other bits

    def load_weights(self, folder: Path) -> None:
        """Take the weights of a Hugging Face folder, whatever was loaded before."""

    def next_logprobs(self, contexts: Sequence[tuple[int, ...]], ids: Sequence[int]) -> np.ndarray:
        """float32 [len(ids)], nats: log-prob of each id right after its context, by the path that generates.

        Call after load_weights and before generate, so that it sees whatever caches the load has left.
        """

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """(index of the request, its completion) as they end. Take all of them before anything else is asked."""


def in_order(finished: Iterable[tuple[int, Completion]]) -> list[Completion]:
    """All that generate gives, one per request, in their order."""
    return [completion for _, completion in sorted(finished, key=lambda pair: pair[0])]
