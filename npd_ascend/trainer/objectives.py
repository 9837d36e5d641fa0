"""SFT and NPD as targets of one operation, npd_kernels.token_loss; GRPO (policy_loss.py) on npd_kernels.token_logprobs.

NPD, per answer token with sampled token y and the teacher's top-k set C (NPD paper, its loss equation):
    L = (1-λ)·(-log p_S(y)) + λ·Σ_{c∈C} p_T(c)·(log p_T(c) - log p_S(c))
is a cross-entropy against the sparse soft target {y: 1-λ} ∪ {c: λ·p_T(c)} plus a constant. SFT is λ = 0
without C. p_S is over the full vocabulary; p_T is renormalised over C, or keeps its full-vocabulary
values with one tail bucket for everything outside C (`targets: tail`). With the tail both are distributions over k + 1
outcomes, and the KL may be turned round or be Jensen and Shannon's (`divergence`).

Dimensions: A answer tokens of a pack, K = teacher's top-k, S = K + 1 target slots, O = K + 1 outcomes, the tail last.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from npd_ascend.config import Config, GrpoConfig
from npd_ascend.device import to_device
from npd_ascend.model.decoder import Decoder
from npd_ascend.packing import PackLayout, lay_out
from npd_ascend.records import Sample
from npd_ascend.trainer.policy_loss import PolicyTargets, policy_loss, watched_names
from npd_kernels.token_loss import VocabShard, token_logprobs, token_loss

# Below this the mass of a tail is rounding noise of 1 - sum(p).
_TAIL_FLOOR = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """lambda_ = 0 is SFT and needs no teacher columns."""

    lambda_: float = 0.0
    targets: str = "renormalised"  # or "tail"
    divergence: str = "forward"  # with "tail" also "reverse", "jsd"
    normalise: str = "token"  # weight of a token: token 1, sample 1/len, sqrt 1/sqrt(len)
    loss_impl: str = "chunked"
    grpo: GrpoConfig | None = None  # then nothing above but normalise counts

    @property
    def watched(self) -> tuple[str, ...]:
        """Metrics whose sums over tokens batch_loss gives beside the loss."""
        return watched_names(self.grpo) if self.grpo else ()


def npd_objective(config: Config) -> Objective:
    """What the npd section asks for."""
    npd = config.npd
    return Objective(
        lambda_=npd.lambda_,
        targets=npd.targets,
        divergence=npd.divergence,
        normalise=npd.normalise,
        loss_impl=config.kernels.loss,
    )


def grpo_objective(config: Config) -> Objective:
    """What the grpo section asks for."""
    return Objective(normalise=config.grpo.normalise, loss_impl=config.kernels.loss, grpo=config.grpo)


@dataclass(frozen=True, slots=True)
class Batch:
    """One pack with its targets, on the device."""

    layout: PackLayout
    target_ids_AS: torch.Tensor  # int64, slot 0 the given token, then the teacher's top-k
    teacher_probs_AK: torch.Tensor | None  # float32, renormalised or full-vocabulary values
    token_weight_A: torch.Tensor  # float32
    policy: PolicyTargets | None = None  # of GRPO


def weight_sum(samples: Iterable[Sample], objective: Objective) -> float:
    """What the loss is divided by, once, after it was summed over the global batch `samples` on all ranks."""
    lens = (len(sample.token_ids) - sample.prompt_len for sample in samples)
    return math.fsum({"token": n, "sample": 1.0, "sqrt": math.sqrt(n)}[objective.normalise] for n in lens)


def make_batch(samples: Sequence[Sample], objective: Objective, device: torch.device, multiple_of: int = 1) -> Batch:
    """Lay the samples of one pack out with the targets of `objective`; multiple_of: see lay_out."""
    layout = lay_out([(sample.token_ids, sample.prompt_len) for sample in samples], device, multiple_of)
    lens = np.array(layout.answer_lens)
    per_sample = {"token": np.ones(len(lens)), "sample": 1 / lens, "sqrt": lens**-0.5}[objective.normalise]
    token_weight_A = to_device(per_sample.astype(np.float32).repeat(lens), device)
    ids_AS, probs_AK = layout.answer_ids_A[:, None], None
    if objective.lambda_ > 0:
        topk_ids_AK = to_device(np.concatenate([sample.teacher_topk_ids for sample in samples]), device)
        logprobs_AK = to_device(np.concatenate([sample.teacher_topk_logprobs for sample in samples]), device)
        probs_AK = logprobs_AK.softmax(-1) if objective.targets == "renormalised" else logprobs_AK.exp()
        ids_AS = torch.cat([ids_AS, topk_ids_AK.long()], 1)
    policy = None
    if objective.grpo:
        advantages = np.array([sample.advantage for sample in samples], np.float32)
        generator_A = np.concatenate([sample.generator_logprobs for sample in samples])
        policy = PolicyTargets(to_device(advantages.repeat(lens), device), to_device(generator_A, device))
    return Batch(layout, ids_AS, probs_AK, token_weight_A, policy)


@torch.no_grad()
def with_reference(batch: Batch, reference: Decoder, objective: Objective) -> Batch:
    """The batch with the log-probs that `reference`, a model cut like the student, gives its answers."""
    hidden_AD = reference(batch.layout.token_ids_T, batch.layout.cu_seqlens)[batch.layout.predict_A]
    logprobs_A = _given_logprobs(hidden_AD, reference.head_weight_VD, batch, objective, reference.vocab_shard)
    return replace(batch, policy=replace(batch.policy, reference_logprobs_A=logprobs_A))


def batch_loss(
    hidden_AD: torch.Tensor,
    weight_VD: torch.Tensor,
    batch: Batch,
    objective: Objective,
    shard: VocabShard | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss_sum, watched_W): the weighted sum in nats with gradients, and the sums of objective.watched, detached."""
    if objective.grpo:
        loss_A, watched_W = policy_loss(
            _given_logprobs(hidden_AD, weight_VD, batch, objective, shard), batch.policy, objective.grpo
        )
        return (batch.token_weight_A * loss_A).sum(), watched_W
    nothing_W = torch.zeros(0, device=hidden_AD.device)
    if batch.teacher_probs_AK is not None and objective.targets == "tail":
        return _tail_loss(hidden_AD, weight_VD, batch, objective, shard), nothing_W
    weights_AS, constant_A = soft_target(batch, objective.lambda_)
    loss_sum, _ = token_loss(
        hidden_AD,
        weight_VD,
        batch.target_ids_AS,
        weights_AS,
        batch.token_weight_A,
        shard=shard,
        impl=objective.loss_impl,
    )
    return loss_sum + (batch.token_weight_A * constant_A).sum(), nothing_W


def _given_logprobs(hidden_AD, weight_VD, batch: Batch, objective: Objective, shard: VocabShard | None) -> torch.Tensor:
    """float32 [A], of the tokens that stand in the answers."""
    ids_A1 = batch.layout.answer_ids_A[:, None]
    return token_logprobs(hidden_AD, weight_VD, ids_A1, shard=shard, impl=objective.loss_impl)[:, 0]


def soft_target(batch: Batch, lambda_: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights_AS, constant_A): slot weights, and λ·Σ p_T log p_T, the part of KL that has no gradient."""
    given_A1 = torch.full_like(batch.token_weight_A[:, None], 1 - lambda_)
    if batch.teacher_probs_AK is None:
        return given_A1, torch.zeros_like(batch.token_weight_A)
    negentropy_A = torch.xlogy(batch.teacher_probs_AK, batch.teacher_probs_AK).sum(-1)
    return torch.cat([given_A1, lambda_ * batch.teacher_probs_AK], 1), lambda_ * negentropy_A


def _tail_loss(hidden_AD, weight_VD, batch: Batch, objective: Objective, shard: VocabShard | None) -> torch.Tensor:
    logprobs_AS = token_logprobs(hidden_AD, weight_VD, batch.target_ids_AS, shard=shard, impl=objective.loss_impl)
    given_A, topk_AK, probs_AK = logprobs_AS[:, 0], logprobs_AS[:, 1:], batch.teacher_probs_AK
    teacher_tail_A1 = (1 - probs_AK.sum(-1, keepdim=True)).clamp(min=0)
    student_tail_A1 = (1 - topk_AK.exp().sum(-1, keepdim=True)).clamp(min=_TAIL_FLOOR)
    divergence_A = divergence(
        torch.cat([probs_AK, teacher_tail_A1], 1), torch.cat([topk_AK, student_tail_A1.log()], 1), objective.divergence
    )
    loss_A = -(1 - objective.lambda_) * given_A + objective.lambda_ * divergence_A
    return (batch.token_weight_A * loss_A).sum()


def divergence(teacher_AO: torch.Tensor, student_log_AO: torch.Tensor, kind: str) -> torch.Tensor:
    """float32 [A], nats: KL(teacher || student) (forward), KL(student || teacher) (reverse), or jsd, the mean of the KL
    of both to their mean (Lin 1991). teacher_AO: probabilities. student_log_AO: logarithms of probabilities."""
    if kind == "forward":
        return (torch.xlogy(teacher_AO, teacher_AO) - teacher_AO * student_log_AO).sum(-1)
    student_AO = student_log_AO.exp()
    if kind == "reverse":
        return (student_AO * (student_log_AO - teacher_AO.clamp(min=_TAIL_FLOOR).log())).sum(-1)
    mean_log_AO = ((teacher_AO + student_AO) / 2).log()
    both_AO = torch.xlogy(teacher_AO, teacher_AO) + student_AO * student_log_AO
    return (both_AO - (teacher_AO + student_AO) * mean_log_AO).sum(-1) / 2
