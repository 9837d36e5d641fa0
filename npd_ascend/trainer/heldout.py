"""What is watched while training. Without generating: distance to the teacher and drift from the generator on held-out
rollouts, exact match on held-out prompts that have a reference answer. By generating: length and entropy of the
trainer's own greedy answers."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from npd_ascend.device import to_device
from npd_ascend.model.decoder import Decoder
from npd_ascend.packing import PackLayout, lay_out, pack_samples
from npd_ascend.parallel.mesh import ALONE, Mesh
from npd_ascend.records import Rollout, Sample, Score
from npd_ascend.trainer.decoding import greedy_answers
from npd_ascend.trainer.objectives import Batch, Objective, batch_loss, make_batch
from npd_kernels.token_loss import greedy_ids, token_logprobs

_KL = Objective(lambda_=1.0)


@dataclass(frozen=True, slots=True)
class Generated:
    """A batch of rollouts, and the log-probs of who generated it."""

    batch: Batch
    logprobs_A: torch.Tensor  # float32


@dataclass(frozen=True, slots=True)
class References:
    """Held-out prompts with their reference answers, in packs."""

    layouts: list[PackLayout]
    prompts: int  # those whose answer is too long to be given are in no pack
    vocab_size: int  # of the tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """Held-out prompts that the trainer answers by greedy decoding, `batch` at a time."""

    prompts: Sequence[tuple[int, ...]]
    batch: int
    max_new_tokens: int
    eos_id: int
    vocab_size: int  # of the tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Heldout:
    """Fixed batches: teacher's top-k on rollouts of version 0, log-probs of the newest generator on its own, reference
    answers, prompts to answer. What is not there is not measured."""

    teacher_batches: Sequence[Batch] = ()
    generated: Sequence[Generated] = ()
    references: References | None = None
    questions: Questions | None = None
    objective: Objective = _KL
    version: int = 0  # of the newest generator

    @torch.inference_mode()
    def measure(self, model: Decoder, mesh: Mesh = ALONE) -> dict[str, float]:
        """Means over all held-out tokens or prompts, the batches shared among replicas; names with '__' for '/'."""
        started = time.perf_counter()
        sums = torch.zeros(5, device=model.embed.weight.device)
        mine = slice(mesh.dp_rank, None, mesh.dp)
        for batch in self.teacher_batches[mine]:
            hidden_AD = _hidden(model, batch)
            sums[0] += batch_loss(hidden_AD, model.head_weight_VD, batch, self.objective, model.vocab_shard)[0]
        for generated in self.generated[mine]:
            sums[1] += drift_sum(model, generated, self.objective.loss_impl)
        if self.references:
            for layout in self.references.layouts[mine]:
                sums[2] += exact_matches(model, layout, self.references.vocab_size)
        if self.questions:
            sums[3:] += torch.tensor(answer_sums(model, self.questions, mesh), device=sums.device)
        kl_sum, total_drift, matches, given, entropy_sum = mesh.sum_over_dp(sums).tolist()
        measured: dict[str, float] = {}
        if self.teacher_batches:
            tokens = sum(len(batch.layout.answer_ids_A) for batch in self.teacher_batches)
            measured["heldout__kl_teacher"] = kl_sum / tokens
        if self.generated:
            tokens = sum(len(generated.logprobs_A) for generated in self.generated)
            measured |= {"heldout__drift": total_drift / tokens, "heldout__version": self.version}
        if self.references:
            measured["heldout__exact_match"] = matches / self.references.prompts
        if self.questions:
            measured["heldout__answer_tokens"] = given / len(self.questions.prompts)
            measured["heldout__entropy"] = entropy_sum / given
        return measured and measured | {"heldout__busy_s": time.perf_counter() - started}


def make_heldout(
    first: Sequence[tuple[Rollout, Score]],
    newest: Sequence[Rollout],
    *,
    pack_tokens: int,
    loss_impl: str,
    device: torch.device,
    multiple_of: int = 1,
    references: References | None = None,
    questions: Questions | None = None,
) -> Heldout:
    """first: held-out rollouts of version 0 with scores; newest: held-out rollouts of the newest version, perhaps
    none, and then drift is not measured."""
    objective = Objective(lambda_=1.0, loss_impl=loss_impl)
    scored = {
        rollout.sample_id: Sample(
            sample_id=rollout.sample_id,
            token_ids=rollout.token_ids,
            prompt_len=rollout.prompt_len,
            teacher_topk_ids=score.teacher_topk_ids,
            teacher_topk_logprobs=score.teacher_topk_logprobs,
        )
        for rollout, score in first
    }
    return Heldout(
        teacher_batches=[make_batch(pack, objective, device, multiple_of) for pack in _packs(scored, pack_tokens)],
        generated=make_generated(newest, pack_tokens=pack_tokens, device=device, multiple_of=multiple_of),
        references=references,
        questions=questions,
        objective=objective,
        version=newest[0].weight_version if newest else 0,
    )


def make_references(
    answered: Sequence[Sample],
    *,
    prompts: int,
    vocab_size: int,
    pack_tokens: int,
    device: torch.device,
    multiple_of: int = 1,
) -> References:
    """answered: held-out prompts, each followed by the tokens that greedy decoding has to give."""
    packs = _packs({sample.sample_id: sample for sample in answered}, pack_tokens)
    layouts = [
        lay_out([(sample.token_ids, sample.prompt_len) for sample in pack], device, multiple_of) for pack in packs
    ]
    return References(layouts, prompts, vocab_size)


def make_generated(
    rollouts: Sequence[Rollout], *, pack_tokens: int, device: torch.device, multiple_of: int
) -> list[Generated]:
    """Rollouts in packs for drift_sum."""
    return [
        Generated(
            make_batch(pack, Objective(), device, multiple_of),
            to_device(np.concatenate([rollout.logprobs for rollout in pack]), device),
        )
        for pack in _packs({rollout.sample_id: rollout for rollout in rollouts}, pack_tokens)
    ]


@torch.inference_mode()
def exact_matches(model: Decoder, layout: PackLayout, vocab_size: int) -> torch.Tensor:
    """How many answers of a pack greedy decoding would give; 0-dim.

    It takes the most likely token after what it has given so far. So it gives an answer if and only if every token of
    that answer is the most likely one after those before it, and one pass over prompt and answer says so.
    """
    hidden_AD = model(layout.token_ids_T, layout.cu_seqlens)[layout.predict_A]
    taken_A = greedy_ids(hidden_AD, model.head_weight_VD, vocab_size=vocab_size, shard=model.vocab_shard)
    lens = np.array(layout.answer_lens)
    sample_A = to_device(np.arange(len(lens)).repeat(lens), taken_A.device)
    wrong_A = (taken_A != layout.answer_ids_A).float()
    wrong_S = torch.zeros(len(lens), device=taken_A.device).index_add_(0, sample_A, wrong_A)
    return (wrong_S == 0).sum()


def answer_sums(model: Decoder, questions: Questions, mesh: Mesh) -> tuple[int, float]:
    """Tokens of this replica's answers, and their entropies added up, in nats."""
    mine, size = questions.prompts[mesh.dp_rank :: mesh.dp], questions.batch
    tokens, entropy = 0, 0.0
    for at in range(0, len(mine), size):
        prompts = mine[at : at + size]
        answers = greedy_answers(
            model,
            [*prompts, *[prompts[0]] * (-len(prompts) % mesh.row_multiple)],
            max_new_tokens=questions.max_new_tokens,
            eos_id=questions.eos_id,
            vocab_size=questions.vocab_size,
        )
        for answer in answers[: len(prompts)]:
            tokens += len(answer.token_ids)
            entropy += float(answer.entropies.sum(dtype=np.float64))
    return tokens, entropy


@torch.inference_mode()
def drift_sum(model: Decoder, generated: Generated, loss_impl: str) -> torch.Tensor:
    """KL(model || generator) summed over the answer tokens: r log r - r + 1 with r the ratio of their probabilities."""
    batch = generated.batch
    current_A1 = token_logprobs(
        _hidden(model, batch),
        model.head_weight_VD,
        batch.layout.answer_ids_A[:, None],
        shard=model.vocab_shard,
        impl=loss_impl,
    )
    log_ratio_A = current_A1[:, 0] - generated.logprobs_A
    return (log_ratio_A.exp() * log_ratio_A - torch.expm1(log_ratio_A)).sum()


def _packs(rows: dict, pack_tokens: int) -> list[list]:
    lengths = {name: len(row.token_ids) for name, row in rows.items()}
    longest = max(lengths.values(), default=1)
    return [[rows[name] for name in pack] for pack in pack_samples(lengths, max(pack_tokens, longest))]


def _hidden(model: Decoder, batch: Batch) -> torch.Tensor:
    return model(batch.layout.token_ids_T, batch.layout.cu_seqlens)[batch.layout.predict_A]
