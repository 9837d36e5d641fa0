"""The sections of the configuration that say how the student is trained: SFT, NPD, GRPO."""

import itertools
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class OptimizerConfig(Section):
    """AdamW, linear warm-up, cosine from lr to min_lr over the whole stage."""

    lr: float = Field(1e-5, gt=0)
    min_lr: float = Field(1e-6, ge=0)
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    clip_norm: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _falls(self):
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}; lower min_lr")
        return self


class StageConfig(Section):
    """What every kind of training has in common."""

    pack_tokens: int = Field(32768, ge=2)
    normalise: Literal["token", "sample", "sqrt"] = "token"  # weight of a token: 1, 1/len, 1/sqrt(len)
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint_every_steps: int = Field(200, ge=1)


class TrainConfig(StageConfig):
    """What SFT and NPD training have in common."""

    epochs: int = Field(ge=1)
    packs_per_step: int = Field(1, ge=1)  # the global batch, in packs


class StreamConfig(Section):
    """Rollouts, teacher and trainer side by side; a step trains on the next shards as soon as they are decided."""

    shards_per_step: int = Field(1, ge=1)  # the global batch, in shards of rollout.batch_size answers
    max_lag: int = Field(1, ge=0)  # versions that a sample may be behind when it is trained on
    publish_every: int = Field(16, ge=1)  # steps from version to version; with publish_at_kl the longest interval
    publish_at_kl: float | None = Field(None, gt=0)  # publish once KL(current || generator) passes it; nats/token
    publish_not_before: int = Field(4, ge=1)  # steps; the shortest interval with publish_at_kl

    @model_validator(mode="after")
    def _intervals_fit(self):
        if self.publish_at_kl is not None and self.publish_not_before > self.publish_every:
            raise ValueError(
                f"publish_not_before={self.publish_not_before} is above publish_every={self.publish_every}; lower it"
            )
        return self

    @property
    def shortest_interval(self) -> int:
        """Steps."""
        return self.publish_every if self.publish_at_kl is None else self.publish_not_before


@dataclass(frozen=True, slots=True)
class Phase:
    """Epochs [first, last) of NPD on one set of rollouts, from the weights of version `number` on."""

    number: int
    version: int  # that generated the set
    first: int
    last: int


class NpdConfig(TrainConfig):
    epochs: int = Field(10, ge=1)  # with stream: passes over data.prompts, every one with fresh answers
    refresh_after: tuple[int, ...] = (5,)  # new rollouts by the student as it is after these epochs
    overlap: bool = False  # a set is generated while the set before it trains, by the student at that phase's start
    stream: StreamConfig | None = None  # in the place of refresh_after and packs_per_step
    lambda_: float = Field(0.9, ge=0, le=1, alias="lambda")
    targets: Literal["renormalised", "tail"] = "renormalised"
    divergence: Literal["forward", "reverse", "jsd"] = "forward"  # the last two want targets: tail

    def generator_of(self, number: int) -> int:
        """The weight version that generates set `number` of the schedule without stream."""
        return max(0, number - self.overlap)

    @property
    def phases(self) -> list[Phase]:
        """The epochs cut at the refreshes: the student as it is after refresh i, or one before, generates set i."""
        cuts = [0, *self.refresh_after, self.epochs]
        return [Phase(i, self.generator_of(i), *ends) for i, ends in enumerate(itertools.pairwise(cuts))]

    @model_validator(mode="before")
    @classmethod
    def _one_schedule(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or raw.get("stream") is None:
            return raw
        for key, unset in (("refresh_after", []), ("packs_per_step", 1), ("overlap", False)):
            if raw.get(key) not in (None, (), unset):
                raise ValueError(f"{key} is not for npd.stream, which goes by steps of whole shards; set it to {unset}")
        return raw | {"refresh_after": ()}

    @model_validator(mode="after")
    def _divergence_has_whole_distributions(self):
        if self.divergence != "forward" and self.targets != "tail":
            raise ValueError(
                f"divergence={self.divergence} weighs what the student gives to all other tokens, which "
                f"targets={self.targets} does not hold; set targets: tail"
            )
        return self

    @model_validator(mode="after")
    def _refreshes_inside(self):
        inside = all(0 < epoch < self.epochs for epoch in self.refresh_after)
        if not inside or list(self.refresh_after) != sorted(set(self.refresh_after)):
            raise ValueError(
                f"refresh_after={list(self.refresh_after)} must rise and lie between 1 and epochs-1={self.epochs - 1}"
            )
        return self


RewardName = Literal["exact_match", "math_verify", "reasoning_gym", "format"]


class GrpoConfig(StageConfig):
    """Answers to the same problem in groups, a reward each; docs/method.md has the formula and its sources."""

    steps: int = Field(300, ge=1)
    groups_per_step: int = Field(16, ge=1)  # problems
    group_size: int = Field(8, ge=2)  # answers to each
    publish_every: int = Field(1, ge=1)  # steps trained on the answers of one weight version; 1: on-policy
    max_lag: int = Field(0, ge=0)  # versions that an answer may be behind when it is trained on; 0: generators wait
    rewards: dict[RewardName, Annotated[float, Field(gt=0)]] = {"exact_match": 1.0}  # and the weight of each in the sum
    format: str | None = None  # regular expression that the whole answer must match; for the reward `format`
    reward_timeout_s: float = Field(10.0, gt=0)  # after which a reward function is stopped
    clip_low: float = Field(0.2, gt=0, lt=1)  # the ratio of new to old probability counts from 1 - clip_low ...
    clip_high: float = Field(0.2, gt=0)  # ... to 1 + clip_high
    kl_weight: float = Field(0.0, ge=0)  # of KL to the student that the stage starts from
    normalise: Literal["token", "sample", "sqrt"] = "sample"

    @model_validator(mode="after")
    def _rewards_fit(self):
        if not self.rewards:
            raise ValueError("rewards is empty; name at least one, for example {exact_match: 1}")
        if ("format" in self.rewards) != (self.format is not None):
            raise ValueError("rewards.format and format, its regular expression, go together; set both or none")
        try:
            re.compile(self.format or "")
        except re.error as error:
            raise ValueError(f"format={self.format!r} is no regular expression ({error})") from None
        return self
