"""What a row of vs_on_policy.py measures while it trains. For both interpreters: torch and safetensors are enough."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

PARTS = ("generation", "teacher", "student", "other")


class Clock:
    """Seconds split into PARTS, gradient passes, and weights saved on the way while the clock stands.

    Processor seconds of this process too: with one thread they hardly move when the machine has other work.
    """

    def __init__(self, job: dict):
        self._job, self._folder = job, Path(job["folder"])
        self._seconds = dict.fromkeys((*PARTS, "paused"), 0.0)
        self._cpu_seconds = dict(self._seconds)
        self._current, self._since = "paused", (time.perf_counter(), time.process_time())
        self.samples = self.tokens = self.answer_tokens = self.updates = self.generated = 0
        self._saved: list[dict] = []

    def enter(self, part: str) -> str:
        """From now on the time is `part`'s; returns whose it was."""
        now = (time.perf_counter(), time.process_time())
        self._seconds[self._current] += now[0] - self._since[0]
        self._cpu_seconds[self._current] += now[1] - self._since[1]
        before, self._current, self._since = self._current, part, now
        return before

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        before = self.enter(name)
        yield
        self.enter(before)

    def timed(self, name: str, fn: Callable) -> Callable:
        def call(*args, **kwargs):
            with self.part(name):
                return fn(*args, **kwargs)

        return call

    @property
    def seconds(self) -> float:
        self.enter(self._current)
        return sum(self._seconds[part] for part in PARTS)

    @property
    def done(self) -> bool:
        return self.samples >= self._job["passes"] or self.seconds >= self._job["seconds"]

    def trained(self, samples: int, tokens: int, answer_tokens: int) -> None:
        """Count one update's gradient passes; tokens without padding."""
        self.samples, self.tokens = self.samples + samples, self.tokens + tokens
        self.answer_tokens, self.updates = self.answer_tokens + answer_tokens, self.updates + 1
        print(f"    {self.samples} passes, {self.seconds:.0f} s", file=sys.stderr, flush=True)

    @property
    def save_is_due(self) -> bool:
        return self.samples >= (len(self._saved) + 1) * self._job["save_every"]

    def save(self, tensors: dict[str, torch.Tensor]) -> None:
        """Weights by their Hugging Face names, in float32, while the clock stands."""
        if self._saved and self._saved[-1]["passes"] == self.samples:
            return
        with self.part("paused"):
            file = self._folder / f"weights-{len(self._saved)}" / "model.safetensors"
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.detach().float().clone() for name, value in tensors.items()}, file)
            self._saved.append({"seconds": self.seconds, "passes": self.samples, "weights": str(file.parent)})

    def result(self) -> dict:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "passes": self.samples,
            "generated": self.generated,
            "updates": self.updates,
            "tokens": self.tokens,
            "answer_tokens": self.answer_tokens,
            "seconds": self.seconds,
            "split": {part: self._seconds[part] for part in PARTS},
            "cpu_split": {part: self._cpu_seconds[part] for part in PARTS},
            "peak_gb": peak / 2**20,
            "saved": self._saved,
        }
