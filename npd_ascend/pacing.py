"""The schedule of npd.stream and of GRPO as arithmetic: shards of a step, and when a shard may be generated.

Nothing that was generated is thrown away for its age. Instead a shard may only be begun when the step that will train
on it cannot come later than `max_lag` published versions from now: the generator is paced, by versions.
"""

from collections.abc import Container, Mapping, Sequence, Sized
from dataclasses import dataclass

from npd_ascend.config import Config, StreamConfig
from npd_ascend.prompts import Wanted, grpo_shards, wanted_shards
from npd_ascend.tokenizer import ChatTokenizer


@dataclass(frozen=True, slots=True)
class Pacing:
    """Shards are counted through the whole run: those of step 0, of step 1, ..., then those of the held-out prompts."""

    shards: list[list[Wanted]]
    training: int  # the first so many are trained on
    stream: StreamConfig

    @property
    def steps(self) -> int:
        return -(-self.training // self.stream.shards_per_step)

    @property
    def heldout(self) -> range:
        return range(self.training, len(self.shards))

    @property
    def order(self) -> list[int]:
        """In which shards are generated and scored: the held-out ones first, since step 0 waits for them."""
        return [*self.heldout, *range(self.training)]

    def shards_of(self, step: int) -> range:
        first = step * self.stream.shards_per_step
        return range(first, min(first + self.stream.shards_per_step, self.training))

    def may_begin(self, shard: int, *, published_at: int, steps_done: int) -> bool:
        """Whether the newest version may generate `shard`.

        published_at: steps that were done when the newest version was published. steps_done: steps after which it is
        decided whether to publish; read it before published_at.
        """
        if shard >= self.training:
            return True
        step, interval = shard // self.stream.shards_per_step, self.stream.shortest_interval
        earliest = max(published_at + interval, steps_done + 1)  # where the next version can come
        newer = 0 if step < earliest else 1 + (step - earliest) // interval
        return newer <= self.stream.max_lag


def open_pacing(config: Config, tokenizer: ChatTokenizer) -> Pacing:
    """The pacing of a run with npd.stream."""
    shards = wanted_shards(config, tokenizer)
    return Pacing(shards, sum(not shard[0][0].heldout for shard in shards), config.npd.stream)


def open_grpo_pacing(config: Config, tokenizer: ChatTokenizer) -> Pacing:
    """The pacing of GRPO, which has no held-out shards."""
    grpo, shards = config.grpo, grpo_shards(config, tokenizer)
    stream = StreamConfig(
        shards_per_step=len(shards) // grpo.steps, max_lag=grpo.max_lag, publish_every=grpo.publish_every
    )
    return Pacing(shards, len(shards), stream)


def share(shards: Sequence[int], worker: int | None, workers: int) -> list[int]:
    """Those that worker number `worker` of `workers` makes, in order; None makes all."""
    return [shard for shard in shards if worker is None or shard % workers == worker]


def left_of(
    mine: Sequence[int], committed: Container[int], shards: Mapping[int, Sized] | Sequence[Sized]
) -> tuple[list[int], int, int]:
    """(those of `mine` that are not committed, in order; samples of `mine`; samples of those that are committed)."""
    missing = [shard for shard in mine if shard not in committed]
    total = sum(len(shards[shard]) for shard in mine)
    return missing, total, total - sum(len(shards[shard]) for shard in missing)
