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
class Heldout:
    """Fixed batches: teacher's top-k on rollouts of version 0, log-probs of the newest generator on its own."""

    teacher_batches: list[Batch]
    generator_batches: list[Batch]
    generator_logprobs: list[torch.Tensor]  # float32 [A] beside each generator batch
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
        for batch, generator_A in zip(self.generator_batches[mine], self.generator_logprobs[mine], strict=True):
            current_A1 = token_logprobs(
                _hidden(model, batch),
                model.head_weight_VD,
                batch.layout.answer_ids_A[:, None],
                shard=model.vocab_shard,
                impl=self.objective.loss_impl,
            )
            log_ratio_A = current_A1[:, 0] - generator_A
            sums[1] += (log_ratio_A.exp() * log_ratio_A - torch.expm1(log_ratio_A)).sum()
        kl_sum, drift_sum = mesh.sum_over_dp(sums).tolist()
        return {
            "heldout__kl_teacher": kl_sum / sum(len(batch.layout.answer_ids_A) for batch in self.teacher_batches),
            "heldout__drift": drift_sum / sum(len(batch.layout.answer_ids_A) for batch in self.generator_batches),
            "heldout__version": self.version,
        }


def make_heldout(
    first: Sequence[tuple[Rollout, Score]],
    newest: Sequence[Rollout],
    *,
    pack_tokens: int,
    loss_impl: str,
    device: torch.device,
    multiple_of: int = 1,
) -> Heldout:
    """first: held-out rollouts of version 0 with scores; newest: held-out rollouts of the newest version."""
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
    generated = {rollout.sample_id: rollout for rollout in newest}
    generator_packs = _packs(generated, pack_tokens)
    plain = Objective(loss_impl=loss_impl)
    return Heldout(
        teacher_batches=[make_batch(pack, objective, device, multiple_of) for pack in _packs(scored, pack_tokens)],
        generator_batches=[make_batch(pack, plain, device, multiple_of) for pack in generator_packs],
        generator_logprobs=[
            torch.from_numpy(np.concatenate([rollout.logprobs for rollout in pack])).to(device)
            for pack in generator_packs
        ],
        objective=objective,
        version=newest[0].weight_version,
    )


def _packs(rows: dict, pack_tokens: int) -> list[list]:
    lengths = {name: len(row.token_ids) for name, row in rows.items()}
    longest = max(lengths.values(), default=1)
    return [[rows[name] for name in pack] for pack in pack_samples(lengths, max(pack_tokens, longest))]


def _hidden(model: Decoder, batch: Batch) -> torch.Tensor:
    return model(batch.layout.token_ids_T, batch.layout.cu_seqlens)[batch.layout.predict_A]
