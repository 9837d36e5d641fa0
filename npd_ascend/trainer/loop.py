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
    cursor = {"epoch": epochs[0], "step_in_epoch": 0, "step": 0}
    if checkpoint := load_checkpoint(checkpoints):
        optimizer.load_state_tensors(checkpoint[0])
        cursor = checkpoint[1]
        _log.info("going on at epoch %(epoch)d, step %(step)d", cursor)
    if cursor["epoch"] >= epochs[1]:
        return
    by_id = {sample.sample_id: sample for sample in samples}
    lengths = {name: len(sample.token_ids) for name, sample in by_id.items()}
    packs = pack_samples(lengths, config.pack_tokens)
    steps_per_epoch = -(-len(packs) // config.packs_per_step)
    device, step = model.embed.weight.device, cursor["step"]
    metrics.log(step, pack__fill=pack_fill(lengths, packs, config.pack_tokens), pack__samples=len(samples))
    if heldout and cursor["step_in_epoch"] == 0:
        metrics.log(step, train__epoch=cursor["epoch"], **heldout.measure(model))

    total = (epochs[1] - epochs[0]) * steps_per_epoch
    done = (cursor["epoch"] - epochs[0]) * steps_per_epoch + cursor["step_in_epoch"]
    with progress(f"{checkpoints.name} epochs {epochs[0] + 1}-{epochs[1]}", total, "steps", done) as bar:
        for epoch in range(cursor["epoch"], epochs[1]):
            order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(packs))
            first_step = cursor["step_in_epoch"] if epoch == cursor["epoch"] else 0
            for step_in_epoch in range(first_step, steps_per_epoch):
                started = time.perf_counter()
                chosen = order[step_in_epoch * config.packs_per_step :][: config.packs_per_step]
                batches = [make_batch([by_id[name] for name in packs[i]], objective, device) for i in chosen]
                done_epochs = epoch + step_in_epoch / steps_per_epoch
                lr = learning_rate(done_epochs / config.epochs, step, config.optimizer)
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
                step += 1
                bar.set_postfix(loss=f"{stats.loss:.3f}", refresh=False)
                bar.update()
                if step % config.checkpoint_every_steps == 0 and step_in_epoch + 1 < steps_per_epoch:
                    place = {"epoch": epoch, "step_in_epoch": step_in_epoch + 1, "step": step}
                    save_checkpoint(checkpoints, step, optimizer.state_tensors(), place)
            if heldout:
                metrics.log(step, train__epoch=epoch + 1, **heldout.measure(model))
            place = {"epoch": epoch + 1, "step_in_epoch": 0, "step": step}
            save_checkpoint(checkpoints, step, optimizer.state_tensors(), place)
