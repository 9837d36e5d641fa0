"""Seconds of the stages of one cycle, from the rates of a card and the flops of the models."""

from dataclasses import dataclass

import torch

from npd_ascend.model.families import DecoderConfig
from npd_ascend.planner.memory import Layout, kv_bytes_per_token
from npd_ascend.planner.rates import Hardware

# of the matrix products of a forward: forward, gradient of the input, gradient of the weights; once more if recomputed
_PASSES = {"off": 3, "selective": 3, "full": 4}


@dataclass(frozen=True, slots=True)
class Samples:
    """The mean sample."""

    tokens: float
    answer_share: float  # of its tokens; the head is multiplied for these


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a cycle works on. Lengths are means, in tokens."""

    samples: int  # of one set of rollouts
    prompt_tokens: float
    answer_tokens: float
    epochs: int
    sets: int  # of rollouts: one and one per refresh
    kept: float = 1.0  # share of the samples that the filters leave

    @property
    def mean(self) -> Samples:
        tokens = self.prompt_tokens + self.answer_tokens
        return Samples(tokens, self.answer_tokens / tokens)


@dataclass(frozen=True, slots=True)
class StageTime:
    stage: str
    cards: int  # that are busy
    tokens: float
    seconds: float

    @property
    def card_hours(self) -> float:
        return self.cards * self.seconds / 3600


def step_seconds(
    config: DecoderConfig, layout: Layout, dtype: torch.dtype, hardware: Hardware, samples: Samples
) -> tuple[float, float]:
    """(products and attention, communication) of one update, as if nothing overlapped.

    A ring moves 2 (n-1)/n of the bytes of an all-reduce.
    """
    tp, dp, tokens = layout.tp, layout.dp, layout.pack_tokens
    ranks = tp * dp if hardware.shared else 1
    rate = _flops_per_s(dtype, hardware) / ranks
    compute = layout.packs_per_rank * _forward_flops(config, tokens, samples) * _PASSES[layout.recompute] / tp / rate
    reduces = config.num_layers * (5 if layout.recompute == "full" else 4) + 2
    hidden = tokens * config.hidden_size * dtype.itemsize
    layers = layout.packs_per_rank * reduces * hidden * 2 * (tp - 1) / tp
    # reduce-scatter of float32 gradients, gather of weights
    replicas = config.num_parameters / tp * (4 + dtype.itemsize) * (dp - 1) / dp
    return compute, (layers + replicas) / hardware.bus.value


def train_tokens_per_s(
    config: DecoderConfig, layout: Layout, dtype: torch.dtype, hardware: Hardware, samples: Samples
) -> float:
    """Of all cards together."""
    seconds = sum(step_seconds(config, layout, dtype, hardware, samples))
    return layout.packs_per_rank * layout.pack_tokens * layout.dp / seconds


def prefill_tokens_per_s(config: DecoderConfig, dtype: torch.dtype, hardware: Hardware, samples: Samples) -> float:
    """Of one card, without gradients."""
    return _flops_per_s(dtype, hardware) / _forward_flops(config, 1, samples)


def decode_tokens_per_s(
    config: DecoderConfig, dtype: torch.dtype, hardware: Hardware, *, batch: int, context: float
) -> float:
    """Of one card that answers `batch` requests at once, whose context is `context` tokens in the mean."""
    traffic = dtype.itemsize * config.num_parameters + batch * context * kv_bytes_per_token(config, dtype)
    # a causal mask halves the attention of a whole sample, not that of its next token
    products = batch * _forward_flops(config, 1, Samples(2 * context, 1.0))
    step = max(
        hardware.decode_floor.value,
        traffic / hardware.decode_memory.value,
        products / (hardware.flops[dtype].value * hardware.decode_share.value),
    )
    return batch / (step + batch * hardware.decode_draw.value)


def _flops_per_s(dtype: torch.dtype, hardware: Hardware) -> float:
    return hardware.flops[dtype].value * hardware.train_share[dtype].value


def _forward_flops(config: DecoderConfig, tokens: int, samples: Samples) -> float:
    """Of `tokens` tokens; DecoderConfig.forward_flops for mean lengths."""
    attention = config.num_layers * 2 * config.qkv_rows[0] * samples.tokens
    head = 2 * config.vocab_size * config.hidden_size * samples.answer_share
    return tokens * (config.num_layers * 2 * config.layer_matrix_size + attention + head)


def answering(
    student: DecoderConfig,
    rollout: tuple[torch.dtype, int],
    work: Workload,
    hardware: Hardware,
    processes: int = 1,
    stage: str = "rollout",
) -> StageTime:
    """All rollouts. rollout: dtype and batch. processes: each on a card of its own, or all on one host."""
    answers, generators = work.samples * work.sets * work.answer_tokens, 1 if hardware.shared else processes
    rate = decode_tokens_per_s(
        student, rollout[0], hardware, batch=rollout[1], context=work.prompt_tokens + work.answer_tokens / 2
    )
    return StageTime(stage, generators, answers, answers / rate / generators)


def training(
    student: tuple[DecoderConfig, torch.dtype],
    layout: Layout,
    work: Workload,
    hardware: Hardware,
    stage: str = "distill",
) -> StageTime:
    """All passes over the samples that are kept."""
    tokens = work.kept * work.samples * work.mean.tokens * work.epochs
    rate = train_tokens_per_s(student[0], layout, student[1], hardware, work.mean)
    return StageTime(stage, layout.tp * layout.dp, tokens, tokens / rate)


def cycle(
    student: tuple[DecoderConfig, torch.dtype],
    teacher: tuple[DecoderConfig, torch.dtype],
    rollout: tuple[torch.dtype, int],
    layout: Layout,
    work: Workload,
    hardware: Hardware,
    processes: tuple[int, int] = (1, 1),
) -> list[StageTime]:
    """Rollouts, teacher and training of one cycle; models with their dtypes, rollout as in `answering`.

    processes: of rollouts and of the teacher. The teacher reads every sample and once more its answer alone, which the
    student reads too.
    """
    alone = Samples(work.answer_tokens, 1.0)
    answers, read = work.samples * work.sets * work.answer_tokens, work.samples * work.sets * work.mean.tokens
    prefill = read / prefill_tokens_per_s(*teacher, hardware, work.mean)
    prefill += answers / prefill_tokens_per_s(*teacher, hardware, alone)
    prefill += answers / prefill_tokens_per_s(student[0], rollout[0], hardware, alone)
    teachers = 1 if hardware.shared else processes[1]
    return [
        answering(student[0], rollout, work, hardware, processes[0]),
        StageTime("score", teachers, read + 2 * answers, prefill / teachers),
        training(student, layout, work, hardware),
    ]
