"""The epochs: packs into steps, checkpoints on the way, held-out metrics at every epoch's end.

The cursor is (epoch, step in the epoch) over packs that are a function of the committed samples, in an
order that is a function of (seed, epoch); so a run that was killed goes on bit-equal.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from npd_ascend.checkpoint import load_checkpoint, save_checkpoint
from npd_ascend.config import TrainConfig
from npd_ascend.errors import UserError
from npd_ascend.metrics import MetricsLog
from npd_ascend.model.decoder import Decoder
from npd_ascend.packing import pack_fill, pack_samples
from npd_ascend.progress import progress
from npd_ascend.records import Sample
from npd_ascend.trainer.heldout import Heldout
from npd_ascend.trainer.objectives import Objective, make_batch
from npd_ascend.trainer.optimizer import MasterAdamW
from npd_ascend.trainer.schedule import learning_rate
from npd_ascend.trainer.step import train_step

_log = logging.getLogger(__name__)


def fit(
    model: Decoder,
    samples: Sequence[Sample],
    objective: Objective,
    config: TrainConfig,
    *,
    epochs: tuple[int, int],
    seed: int,
    checkpoints: Path,
    metrics: MetricsLog,
    heldout: Heldout | None = None,
) -> None:
    """Train `model` in place over epochs [first, last) of config.epochs, from the newest checkpoint if there is one.

    samples: the training set of these epochs; heldout: measured before the first and after every epoch.
    """
    optimizer = MasterAdamW(model, config.optimizer)
    cursor = _resume(optimizer, checkpoints, epochs[0])
    if cursor["epoch"] >= epochs[1]:
        return
    by_id = {sample.sample_id: sample for sample in samples}
    lengths = {name: len(sample.token_ids) for name, sample in by_id.items()}
    packs = [[by_id[name] for name in pack] for pack in pack_samples(lengths, config.pack_tokens)]
    metrics.log(
        cursor["step"],
        pack__fill=pack_fill(sum(lengths.values()), len(packs), config.pack_tokens),
        pack__samples=len(samples),
    )
    if heldout and cursor["step_in_epoch"] == 0:
        metrics.log(cursor["step"], train__epoch=cursor["epoch"], **heldout.measure(model))

    steps_per_epoch = -(-len(packs) // config.packs_per_step)
    total = (epochs[1] - epochs[0]) * steps_per_epoch
    done = (cursor["epoch"] - epochs[0]) * steps_per_epoch + cursor["step_in_epoch"]
    with progress(f"{checkpoints.name} epochs {epochs[0] + 1}-{epochs[1]}", total, "steps", done) as bar:
        while cursor["epoch"] < epochs[1]:
            order = np.random.Generator(np.random.PCG64([seed, cursor["epoch"]])).permutation(len(packs))
            for at in range(cursor["step_in_epoch"], steps_per_epoch):
                chosen = order[at * config.packs_per_step :][: config.packs_per_step]
                done_epochs = cursor["epoch"] + at / steps_per_epoch
                loss = _step(
                    model, [packs[i] for i in chosen], objective, config, optimizer, metrics, cursor, done_epochs
                )
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
                cursor |= {"step_in_epoch": at + 1, "step": cursor["step"] + 1}
                if cursor["step"] % config.checkpoint_every_steps == 0 and at + 1 < steps_per_epoch:
                    save_checkpoint(checkpoints, cursor["step"], optimizer.state_tensors(), cursor)
            cursor |= {"epoch": cursor["epoch"] + 1, "step_in_epoch": 0}
            if heldout:
                metrics.log(cursor["step"], train__epoch=cursor["epoch"], **heldout.measure(model))
            save_checkpoint(checkpoints, cursor["step"], optimizer.state_tensors(), cursor)


def _resume(optimizer: MasterAdamW, checkpoints: Path, first_epoch: int) -> dict[str, int]:
    """The cursor to go on from, with the optimizer as it was there."""
    checkpoint = load_checkpoint(checkpoints)
    epoch = checkpoint[1]["epoch"] if checkpoint else 0
    if epoch < first_epoch:
        raise UserError(
            f"{checkpoints}: no intact checkpoint of epoch {first_epoch}, where this phase starts (the newest is of "
            f"epoch {epoch}); a fresh optimizer would be another run, so start again with a new run.folder"
        )
    if checkpoint is None:
        return {"epoch": 0, "step_in_epoch": 0, "step": 0}
    optimizer.load_state_tensors(checkpoint[0])
    _log.info("going on at epoch %(epoch)d, step %(step)d", checkpoint[1])
    return checkpoint[1]


def _step(
    model: Decoder,
    packs: Sequence[Sequence[Sample]],
    objective: Objective,
    config: TrainConfig,
    optimizer: MasterAdamW,
    metrics: MetricsLog,
    cursor: dict[str, int],
    done_epochs: float,
) -> float:
    """One optimizer step, logged; returns its loss."""
    started, step = time.perf_counter(), cursor["step"]
    lr = learning_rate(done_epochs / config.epochs, step, config.optimizer)
    batches = [make_batch(pack, objective, model.embed.weight.device) for pack in packs]
    stats = train_step(model, batches, optimizer, objective, lr=lr)
    metrics.log(
        step,
        train__loss=stats.loss,
        train__grad_norm=stats.grad_norm,
        train__lr=lr,
        train__answer_tokens=stats.answer_tokens,
        train__tokens=stats.tokens,
        train__tokens_per_s=stats.tokens / (time.perf_counter() - started),
        train__epoch=done_epochs,
    )
    return stats.loss
