"""The epochs: packs into steps, checkpoints and held-out metrics on the way.

The cursor is (epoch, step in the epoch) over packs that are a function of the committed samples, in an
order that is a function of (seed, epoch); so a run that was killed goes on bit-equal, on any layout of ranks
with the same packs in the same steps.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from npd_ascend.checkpoint import Checkpoints
from npd_ascend.config import StageConfig, TrainConfig
from npd_ascend.errors import UserError
from npd_ascend.metrics import MetricsLog
from npd_ascend.model.decoder import Decoder
from npd_ascend.packing import pack_fill, pack_samples, share_packs
from npd_ascend.parallel.mesh import Mesh
from npd_ascend.progress import progress
from npd_ascend.records import Sample
from npd_ascend.trainer.heldout import Heldout
from npd_ascend.trainer.objectives import Objective, make_batch, weight_sum, with_reference
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
    mesh: Mesh,
    epochs: tuple[int, int],
    seed: int,
    checkpoints: Path,
    metrics: MetricsLog | None,
    heldout: Heldout | None = None,
    measure_every: int | None = None,
) -> None:
    """Train `model` in place over epochs [first, last) of config.epochs, from the newest checkpoint if there is one.

    Called by all ranks alike. samples: the training set of these epochs; heldout: measured before the first epoch,
    after the last, and between them every `measure_every` steps, or after every epoch; metrics: None on ranks that do
    not log.
    """
    training = Training(model, objective, config, mesh, checkpoints, metrics)
    cursor = training.resume(epochs[0])
    if cursor["epoch"] > epochs[1]:
        raise UserError(
            f"{checkpoints}: the newest checkpoint is of epoch {cursor['epoch']}, past epoch {epochs[1]} where this "
            f"phase ends, so its weights cannot be made again here; restore them or start a new run.folder"
        )
    if cursor["epoch"] == epochs[1]:
        return
    by_id = {sample.sample_id: sample for sample in samples}
    lengths = {name: len(sample.token_ids) for name, sample in by_id.items()}
    packs = [[by_id[name] for name in pack] for pack in pack_samples(lengths, config.pack_tokens)]
    fill = pack_fill(sum(lengths.values()), len(packs), config.pack_tokens)
    training.log(cursor["step"], pack__fill=fill, pack__samples=len(samples))
    steps_per_epoch = -(-len(packs) // config.packs_per_step)
    total = (epochs[1] - epochs[0]) * steps_per_epoch
    done = (cursor["epoch"] - epochs[0]) * steps_per_epoch + cursor["step_in_epoch"]
    if heldout and done == 0:
        training.measure(heldout, cursor["step"], cursor["epoch"])
    with progress(
        f"{checkpoints.name} epochs {epochs[0] + 1}-{epochs[1]}", total, "steps", done, shown=mesh.rank == 0
    ) as bar:
        while cursor["epoch"] < epochs[1]:
            order = np.random.Generator(np.random.PCG64([seed, cursor["epoch"]])).permutation(len(packs))
            for at in range(cursor["step_in_epoch"], steps_per_epoch):
                chosen = order[at * config.packs_per_step :][: config.packs_per_step]
                done_epochs = cursor["epoch"] + at / steps_per_epoch
                done_share = done_epochs / config.epochs
                loss = training.step([packs[i] for i in chosen], cursor["step"], done_share, train__epoch=done_epochs)
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
                done += 1
                cursor |= {"step_in_epoch": at + 1, "step": cursor["step"] + 1}
                due = cursor["step"] % measure_every if measure_every else (at + 1) % steps_per_epoch
                if heldout and (due == 0 or done == total):
                    training.measure(heldout, cursor["step"], cursor["epoch"] + (at + 1) / steps_per_epoch)
                if cursor["step"] % config.checkpoint_every_steps == 0 and at + 1 < steps_per_epoch:
                    training.checkpoint(cursor)
            cursor |= {"epoch": cursor["epoch"] + 1, "step_in_epoch": 0}
            training.checkpoint(cursor)
    training.checkpoints.wait()


class Training:
    """What a step needs beside its packs. metrics: None on ranks that do not log; reference: for GRPO's KL."""

    def __init__(
        self,
        model: Decoder,
        objective: Objective,
        config: StageConfig,
        mesh: Mesh,
        checkpoints: Path,
        metrics: MetricsLog | None,
        reference: Decoder | None = None,
    ):
        self.reference = reference
        self.model, self.objective, self.config, self.mesh, self.metrics = model, objective, config, mesh, metrics
        self.optimizer = MasterAdamW(model, config.optimizer, mesh)
        self.checkpoints = Checkpoints(checkpoints, mesh)

    def resume(self, first_epoch: int) -> dict[str, int]:
        """The cursor to go on from, with the optimizer as it was there."""
        cursor = self.checkpoints.load(self.optimizer.rectangles(copies=True))
        epoch = cursor["epoch"] if cursor else 0
        if epoch < first_epoch:
            raise UserError(
                f"{self.checkpoints.folder}: no intact checkpoint of epoch {first_epoch}, where this phase starts (the "
                f"newest is of epoch {epoch}); a fresh optimizer would be another run, so start again with a new "
                f"run.folder"
            )
        if cursor is None:
            return {"epoch": 0, "step_in_epoch": 0, "step": 0}
        self.optimizer.restored(cursor["step"])
        _log.info("going on at epoch %(epoch)d, step %(step)d", cursor)
        return cursor

    def checkpoint(self, cursor: dict[str, int]) -> None:
        self.checkpoints.save(dict(cursor), self.optimizer.rectangles(copies=False))

    def step(self, packs: Sequence[Sequence[Sample]], step: int, done_share: float, **logged: float) -> float:
        """One optimizer step over `packs`, shared among the data-parallel ranks, logged with `logged`; its loss.

        done_share: of the stage, 0 to 1, for the learning rate.
        """
        started = time.perf_counter()
        lr = learning_rate(done_share, step, self.config.optimizer)
        device, multiple = self.model.embed.weight.device, self.mesh.row_multiple
        mine = share_packs([self._cost(pack) for pack in packs], self.mesh.dp)[self.mesh.dp_rank]
        every_sample = [sample for pack in packs for sample in pack]
        batches = [make_batch(packs[i], self.objective, device, multiple) for i in mine]
        if self.reference:
            batches = [with_reference(batch, self.reference, self.objective) for batch in batches]
        stats = train_step(
            self.model,
            batches,
            self.optimizer,
            self.objective,
            weight_sum=weight_sum(every_sample, self.objective),
            lr=lr,
            mesh=self.mesh,
        )
        tokens, seconds = sum(len(sample.token_ids) for sample in every_sample), time.perf_counter() - started
        answer_tokens = tokens - sum(sample.prompt_len for sample in every_sample)
        logged |= {name: value / answer_tokens for name, value in stats.watched.items()}
        self.log(
            step,
            train__loss=stats.loss,
            train__grad_norm=stats.grad_norm,
            train__lr=lr,
            train__answer_tokens=answer_tokens,
            train__tokens=tokens,
            train__tokens_per_s=tokens / seconds,
            train__busy_s=seconds,
            **logged,
        )
        return stats.loss

    def measure(self, heldout: Heldout, step: int, epoch: float) -> None:
        """Log what `heldout` says of the student as it is after `step` steps."""
        if measured := heldout.measure(self.model, self.mesh):
            self.log(step, train__epoch=epoch, **measured)

    def _cost(self, pack: Sequence[Sample]) -> float:
        lengths = [len(sample.token_ids) for sample in pack]
        return self.model.config.forward_flops(lengths, sum(lengths) - sum(sample.prompt_len for sample in pack))

    def log(self, step: int, **values: float) -> None:
        if self.metrics:
            self.metrics.log(step, **values)
