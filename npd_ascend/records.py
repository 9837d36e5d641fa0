"""What crosses a process: each record is frozen and checks itself.

L = tokens of prompt and answer, A = L - prompt_len answer tokens, K = teacher's top-k.
"""

from dataclasses import dataclass

import numpy as np

FINISH_REASONS = ("stop", "length")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question, tokenised with the chat template up to the assistant's turn."""

    prompt_id: str
    text: str  # the user's turn, for people
    token_ids: tuple[int, ...]
    answer: str | None = None  # reference answer, where the source has one
    heldout: bool = False  # held-out prompts are evaluated, never trained on


def sample_id(prompt_id: str, index: int, weight_version: int) -> str:
    """The name of a sample is a function of what made it, so a restart asks for the same names."""
    return f"{prompt_id}/v{weight_version}/{index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One student answer, as it leaves a rollout process."""

    sample_id: str
    prompt_id: str
    weight_version: int  # version of the student that sampled the answer
    heldout: bool
    token_ids: tuple[int, ...]  # [L], prompt then answer, the end token included
    prompt_len: int  # first answer token is token_ids[prompt_len]
    logprobs: np.ndarray  # float32 [A], nats, student at temperature 1 over the full vocabulary
    finish_reason: str  # "stop": ended itself, "length": cut at max_new_tokens

    def __post_init__(self) -> None:
        answer_len = len(self.token_ids) - self.prompt_len
        if answer_len < 1 or self.prompt_len < 1 or len(self.logprobs) != answer_len:
            raise ValueError(
                f"{self.sample_id}: {len(self.token_ids)} tokens, prompt_len {self.prompt_len}, "
                f"{len(self.logprobs)} logprobs; want one logprob per answer token and at least one"
            )
        if self.finish_reason not in FINISH_REASONS:
            raise ValueError(f"{self.sample_id}: finish_reason {self.finish_reason!r} is not one of {FINISH_REASONS}")

    @property
    def answer_len(self) -> int:
        return len(self.token_ids) - self.prompt_len


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What the teacher's prefill and the generator's unconditional pass say about one rollout.

    Log-probs are in nats over the full vocabulary, so that every later choice (renormalised or with
    a tail bucket, either form of IFD) can be made from the stream again.
    """

    sample_id: str
    weight_version: int
    teacher_topk_ids: np.ndarray  # int32 [A, K]
    teacher_topk_logprobs: np.ndarray  # float32 [A, K], falling
    teacher_logprob: np.ndarray  # float32 [A], of the sampled token
    teacher_entropy: float  # nats, mean over the answer, full vocabulary
    teacher_loss: float  # s_T(y|x): mean token loss given the prompt
    teacher_loss_alone: float  # s_T(y): the same after the assistant header alone
    student_loss: float  # s_S(y|x), from the rollout's logprobs
    student_loss_alone: float  # s_S(y), by the weights that generated

    def __post_init__(self) -> None:
        answer_len = len(self.teacher_logprob)
        if self.teacher_topk_ids.shape != self.teacher_topk_logprobs.shape or len(self.teacher_topk_ids) != answer_len:
            raise ValueError(
                f"{self.sample_id}: top-k ids {self.teacher_topk_ids.shape}, log-probs "
                f"{self.teacher_topk_logprobs.shape}, answer {answer_len}; want [A,K], [A,K], A"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether a rollout is trained on, and the one reason if it is not."""

    sample_id: str
    weight_version: int
    kept: bool
    reason: str  # "kept" or a name from filters.REASONS
    ifd_teacher: float | None  # None where a free filter came first and the teacher was never asked
    ifd_student: float | None
    ifd_delta: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """What one rollout of GRPO is worth, or why that is not known."""

    sample_id: str
    weight_version: int
    reward: float | None  # None where a reward function failed
    why: str  # empty, or how it failed: "timeout: ..." or "raised: ..."

    def __post_init__(self) -> None:
        if (self.reward is None) != bool(self.why):
            raise ValueError(f"{self.sample_id}: reward {self.reward} and reason {self.why!r}; want one of the two")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One row of training data: tokens and, for NPD, the teacher's top-k on the answer; for GRPO its advantage."""

    sample_id: str
    token_ids: tuple[int, ...]
    prompt_len: int
    teacher_topk_ids: np.ndarray | None = None  # int32 [A, K]
    teacher_topk_logprobs: np.ndarray | None = None  # float32 [A, K]
    advantage: float | None = None  # of the whole answer
    generator_logprobs: np.ndarray | None = None  # float32 [A], nats, as the rollout was recorded

    @property
    def answer_len(self) -> int:
        return len(self.token_ids) - self.prompt_len
