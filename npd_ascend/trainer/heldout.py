"""What is watched while training: distance to the teacher, and drift from the generator, on held-out rollouts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from npd_ascend.model.decoder import Decoder
from npd_ascend.packing import pack_samples
from npd_ascend.parallel.mesh import ALONE, Mesh
from npd_ascend.records import Rollout, Sample, Score
from npd_ascend.trainer.objectives import Batch, Objective, batch_loss, make_batch
from npd_kernels.token_loss import token_logprobs


@dataclass(frozen=True, slots=True)
class Generated:
    """A batch of rollouts, and the log-probs of who generated it."""

    batch: Batch
    logprobs_A: torch.Tensor  # float32


@dataclass(frozen=True, slots=True)
class Heldout:
    """Fixed batches: teacher's top-k on rollouts of version 0, log-probs of the newest generator on its own."""

    teacher_batches: list[Batch]
    generated: list[Generated]
    objective: Objective  # pure KL: λ = 1
    version: int  # of the newest generator

    @torch.inference_mode()
    def measure(self, model: Decoder, mesh: Mesh = ALONE) -> dict[str, float]:
        """Token means over all held-out rollouts, the batches shared among replicas; names with '__' for '/'."""
        sums = torch.zeros(2, device=model.embed.weight.device)
        mine = slice(mesh.dp_rank, None, mesh.dp)
        for batch in self.teacher_batches[mine]:
            hidden_AD = _hidden(model, batch)
            sums[0] += batch_loss(hidden_AD, model.head_weight_VD, batch, self.objective, model.vocab_shard)[0]
        for generated in self.generated[mine]:
            sums[1] += drift_sum(model, generated, self.objective.loss_impl)
        kl_sum, total_drift = mesh.sum_over_dp(sums).tolist()
        kl = kl_sum / sum(len(batch.layout.answer_ids_A) for batch in self.teacher_batches)
        if not self.generated:
            return {"heldout__kl_teacher": kl}
        drift = total_drift / sum(len(generated.logprobs_A) for generated in self.generated)
        return {"heldout__kl_teacher": kl, "heldout__drift": drift, "heldout__version": self.version}


def make_heldout(
    first: Sequence[tuple[Rollout, Score]],
    newest: Sequence[Rollout],
    *,
    pack_tokens: int,
    loss_impl: str,
    device: torch.device,
    multiple_of: int = 1,
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
        objective=objective,
        version=newest[0].weight_version if newest else 0,
    )


def make_generated(
    rollouts: Sequence[Rollout], *, pack_tokens: int, device: torch.device, multiple_of: int
) -> list[Generated]:
    """Rollouts in packs for drift_sum."""
    return [
        Generated(
            make_batch(pack, Objective(), device, multiple_of),
            torch.from_numpy(np.concatenate([rollout.logprobs for rollout in pack])).to(device),
        )
        for pack in _packs({rollout.sample_id: rollout for rollout in rollouts}, pack_tokens)
    ]


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
