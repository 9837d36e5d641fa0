"""One optimizer step on one screen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from npd_ascend.errors import UserError
from npd_ascend.model.decoder import Decoder
from npd_ascend.trainer.objectives import Batch, Objective, batch_loss
from npd_ascend.trainer.optimizer import MasterAdamW


@dataclass(frozen=True, slots=True)
class StepStats:
    loss: float  # nats per unit of token weight, over the whole step
    grad_norm: float
    answer_tokens: int
    tokens: int


def train_step(
    model: Decoder, batches: Sequence[Batch], optimizer: MasterAdamW, objective: Objective, *, lr: float
) -> StepStats:
    """Sum over all packs of the step, divide once by their common weight, update.

    UserError if the loss or the gradient is not finite; the weights are then as they were.
    """
    weight_sum = math.fsum(batch.weight_sum for batch in batches)  # known before the first backward
    loss = 0.0
    for batch in batches:
        hidden_TD = model(batch.layout.token_ids_T, batch.layout.cu_seqlens)
        loss_sum, _ = batch_loss(hidden_TD[batch.layout.predict_A], model.head_weight_VD, batch, objective)
        pack_loss = loss_sum / weight_sum
        loss += float(pack_loss.detach())
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss}; the last checkpoint is good, lower the learning rate and go on from it"
            )
        pack_loss.backward()
        optimizer.accumulate()
    grad_norm = optimizer.clip()
    if not math.isfinite(grad_norm):
        raise UserError(f"the gradient norm is {grad_norm}; the last checkpoint is good, lower the learning rate")
    optimizer.step(lr)
    return StepStats(
        loss=loss,
        grad_norm=grad_norm,
        answer_tokens=sum(len(batch.layout.answer_ids_A) for batch in batches),
        tokens=sum(len(batch.layout.token_ids_T) for batch in batches),
    )
