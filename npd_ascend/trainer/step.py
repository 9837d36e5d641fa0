"""One optimizer step on one screen."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from npd_ascend.errors import UserError
from npd_ascend.model.decoder import Decoder
from npd_ascend.parallel.mesh import ALONE, Mesh
from npd_ascend.trainer.objectives import Batch, Objective, batch_loss
from npd_ascend.trainer.optimizer import MasterAdamW


@dataclass(frozen=True, slots=True)
class StepStats:
    loss: float  # nats per unit of token weight, over the whole step
    grad_norm: float
    watched: dict[str, float] = field(default_factory=dict)  # sums over all tokens of the step, by objective.watched


def train_step(
    model: Decoder,
    batches: Sequence[Batch],
    optimizer: MasterAdamW,
    objective: Objective,
    *,
    weight_sum: float,
    lr: float,
    mesh: Mesh = ALONE,
) -> StepStats:
    """Sum over all packs of the step on all ranks, divide once by their common weight, update.

    batches: this data-parallel rank's packs, perhaps none. weight_sum: of the packs of all ranks.
    UserError on every rank if the loss or the gradient is not finite; the weights are then as they were.
    """
    sums = torch.zeros(1 + len(objective.watched), device=model.embed.weight.device)
    for batch in batches:
        hidden_TD = model(batch.layout.token_ids_T, batch.layout.cu_seqlens)
        hidden_AD = hidden_TD[batch.layout.predict_A]
        loss_sum, watched_W = batch_loss(hidden_AD, model.head_weight_VD, batch, objective, model.vocab_shard)
        pack_loss = loss_sum / weight_sum
        sums += torch.cat([pack_loss.detach()[None], watched_W])
        with optimizer.gradients.last_backward() if batch is batches[-1] else nullcontext():
            pack_loss.backward()
    grad_norm = optimizer.reduce_and_clip()
    loss, *watched = mesh.sum_over_dp(sums).tolist()
    stats = StepStats(loss=loss, grad_norm=grad_norm, watched=dict(zip(objective.watched, watched, strict=True)))
    if not (math.isfinite(stats.loss) and math.isfinite(stats.grad_norm)):
        raise UserError(
            f"the loss is {stats.loss} and the gradient norm {stats.grad_norm}; the last checkpoint is good, but the "
            f"learning rate is not: start a new run.folder with a lower one"
        )
    optimizer.step(lr)
    return stats
