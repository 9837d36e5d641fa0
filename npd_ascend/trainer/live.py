"""NPD with npd.stream, and GRPO: a step trains on the next shards as soon as they are decided, beside who makes them.

Steps take shards in order, so what a step trains on does not depend on who was faster; it is written to
RUN/stream/packs.jsonl before it is used. The student is a function of the stream: trained again from the same shards,
after a kill or years later, it ends on CPU in float32 with the same bits.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from npd_ascend.config import StageConfig
from npd_ascend.device import DTYPES
from npd_ascend.durable import append_line
from npd_ascend.errors import UserError
from npd_ascend.metrics import MetricsLog
from npd_ascend.model.decoder import Decoder
from npd_ascend.pacing import Pacing, open_pacing
from npd_ascend.packing import pack_fill, pack_samples
from npd_ascend.parallel.mesh import Mesh
from npd_ascend.progress import progress
from npd_ascend.records import Rollout, Sample
from npd_ascend.runfolder import RunFolder
from npd_ascend.status import Status
from npd_ascend.trainer.heldout import Heldout, drift_sum, make_generated
from npd_ascend.trainer.loop import Training
from npd_ascend.trainer.objectives import Objective, npd_objective
from npd_ascend.trainer.samples import heldout_in_shards, kept_in_shards
from npd_ascend.trainer.student import hand_on, load_student, open_metrics, publish
from npd_ascend.weights.control import SILENCE_S
from npd_ascend.weights.sender import WeightSender, open_sender

# how long rank 0 waits for shards before it tells the other ranks, whose patience with it is parallel.timeout_s
_TURN_S = 5.0
_log = logging.getLogger(__name__)


def train_live(run: RunFolder, mesh: Mesh) -> bool:
    """Train every step, publish on the way, export after the last; False if that is done. Called by all ranks."""
    if run.has_trained("npd"):
        return False
    with open_metrics(run, "npd", mesh) as metrics:
        train_to_the_end(LiveTrainer(run, npd_stage(run), mesh, metrics), run, mesh)
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveStage:
    """What NPD with npd.stream and GRPO do in their own way."""

    name: str  # of its section, checkpoints and metrics
    command: str
    awaited: str  # kind of shard that ends the way of a sample to the trainer
    config: StageConfig
    objective: Objective
    pacing: Pacing
    epochs: float  # over the whole stage


def npd_stage(run: RunFolder) -> LiveStage:
    config = run.config
    return LiveStage(
        name="npd",
        command="distill",
        awaited="decisions",
        config=config.npd,
        objective=npd_objective(config),
        pacing=open_pacing(config, run.tokenizer()),
        epochs=config.npd.epochs,
    )


def train_to_the_end(trainer: "LiveTrainer", run: RunFolder, mesh: Mesh) -> None:
    """From the newest checkpoint on; until the last step the generators get weights as rollout.weights says."""
    trainer.resume()
    with _sending(run, mesh, trainer.device) as trainer.sender:
        if trainer.cursor["step"] == trainer.cursor["published_at"]:  # else the weights have moved on
            trainer.offer()
        _train_all(trainer, mesh)
    trainer.finish()


@contextmanager
def _sending(run: RunFolder, mesh: Mesh, model_device: torch.device) -> Iterator[WeightSender | None]:
    rollout = run.config.rollout
    if rollout.weights == "disk":
        yield None
        return
    device = model_device if rollout.weights == "device" else None
    with open_sender(run.weights.folder, DTYPES[rollout.dtype], mesh, timeout_s=SILENCE_S, device=device) as sender:
        yield sender


def _train_all(trainer: "LiveTrainer", mesh: Mesh) -> None:
    """Every step that is left, with a bar, and now and then a line about all processes."""
    steps, status = trainer.pacing.steps, Status(trainer.path)
    with progress(trainer.stage.name, steps, "steps", trainer.cursor["step"], shown=mesh.rank == 0) as bar:
        while trainer.cursor["step"] < steps:
            waited = trainer.wait()
            loss = trainer.step(waited)
            bar.set_postfix(
                loss=f"{loss:.3f}", version=trainer.cursor["version"], waited=f"{waited:.1f}s", refresh=False
            )
            bar.update()
            if mesh.rank == 0 and (line := status.line()):
                bar.write(line, file=sys.stderr)


class LiveTrainer:
    """The student, its optimizer and the cursor {step, updates, version, published_at}.

    updates: steps that changed the weights; one whose samples were all dropped does not.
    """

    def __init__(
        self,
        run: RunFolder,
        stage: LiveStage,
        mesh: Mesh,
        metrics: MetricsLog | None,
        reference: Decoder | None = None,
    ):
        self._run, self._mesh, self.stage, self.pacing = run, mesh, stage, stage.pacing
        self._model = load_student(run.config, run.generator(0), mesh)
        checkpoints = run.checkpoints / stage.name
        self._training = Training(
            self._model, stage.objective, stage.config, mesh, checkpoints, metrics, reference=reference
        )
        self.cursor = {"step": 0, "updates": 0, "version": 0, "published_at": 0}
        self._kept_at = 0  # step of the newest checkpoint
        self._heldout: Heldout | None = None
        self.sender: WeightSender | None = None
        self._heartbeat = run.heartbeat(stage.command) if mesh.rank == 0 else None
        self._written = _written_packs(run)

    @property
    def path(self) -> Path:
        """The run folder."""
        return self._run.path

    @property
    def device(self) -> torch.device:
        return self._model.embed.weight.device

    def resume(self) -> None:
        """From the newest checkpoint, if there is one."""
        optimizer = self._training.optimizer
        cursor = self._training.checkpoints.load(optimizer.rectangles(copies=True))
        if cursor is None:
            return
        optimizer.restored(cursor["updates"])
        self.cursor, self._kept_at = cursor, cursor["step"]
        _log.info("going on at step %(step)d with version %(version)d", cursor)
        self._publish_once()  # the checkpoint of a version is older than the version
        if self._is_measured():
            self._measure_heldout()

    def wait(self) -> float:
        """Until the shards of the next step are decided; returns seconds."""
        shards = [*self.pacing.heldout, *self.pacing.shards_of(self.cursor["step"])]
        waited, ready = 0.0, False
        while not ready:
            ready = self._decided(shards)
            if self._heartbeat and not ready:
                what = f"{self.stage.awaited} of shards {shards[0]} to {shards[-1]}"
                waited += self._heartbeat.wait(lambda: self._decided(shards), what, at_most_s=_TURN_S)
                ready = self._decided(shards)
            ready = self._mesh.from_first(ready)
        return self._mesh.from_first(waited)

    def _decided(self, shards: Sequence[int]) -> bool:
        return self._run.stream.shards(self.stage.awaited).keys() >= set(shards)

    def step(self, waited: float) -> float:
        """Train on the next shards, publish if it is time, keep a checkpoint; returns the loss, NaN without samples."""
        config, step = self.stage.config, self.cursor["step"]
        rows = self._rows(step)
        if step == 0:
            self._measure_heldout()
        drift = self._drift([rollout for rollout, _ in rows])
        loss = float("nan")
        if packs := self._packs(step, [sample for _, sample in rows]):
            lags = [self.cursor["version"] - rollout.weight_version for rollout, _ in rows]
            done_epochs = step / self.pacing.steps * self.stage.epochs
            tokens = sum(len(sample.token_ids) for pack in packs for sample in pack)
            loss = self._training.step(
                packs,
                step,
                done_epochs / self.stage.epochs,
                train__epoch=done_epochs,
                train__wait_s=waited,
                train__lag=sum(lags) / len(lags),
                train__lag_max=max(lags),
                pack__fill=pack_fill(tokens, len(packs), config.pack_tokens),
            )
            self.cursor["updates"] += 1
        self.cursor["step"] = step + 1
        if self._is_time(drift):
            self._publish()
        elif (step + 1) % config.checkpoint_every_steps == 0:
            self._keep()
        if self._heartbeat:
            self._run.stream.mark_done(step + 1)
            self._heartbeat.beat()
        if self._is_measured():  # the generators are at work again by now
            self._measure_heldout()
        return loss

    def finish(self) -> None:
        """The last measurement and the student."""
        self._measure_heldout()
        if self._kept_at != self.cursor["step"]:  # else it is there, from the last step or from before a kill
            self._keep()
        self._training.checkpoints.wait()
        hand_on(self._run, self.stage.name, self._model, self._mesh)

    def _rows(self, step: int) -> list[tuple[Rollout, Sample]]:
        """What the step trains on."""
        return kept_in_shards(self._run, self.pacing.shards_of(step))

    def _keep(self) -> None:
        self._training.checkpoint(self.cursor)
        self._kept_at = self.cursor["step"]

    def _packs(self, step: int, samples: Sequence[Sample]) -> list[list[Sample]]:
        """Of all ranks, as they stand in packs.jsonl or as they are written there now."""
        by_id = {sample.sample_id: sample for sample in samples}
        lengths = {name: len(sample.token_ids) for name, sample in by_id.items()}
        packs = pack_samples(lengths, self.stage.config.pack_tokens)
        if step not in self._written:
            if self._mesh.rank == 0:
                append_line(self._run.packs, json.dumps({"step": step, "packs": packs}))
        elif self._written[step] != packs:
            raise UserError(
                f"{self._run.packs}: step {step} was trained on other samples than its shards have now; restore the "
                f"stream, or start again with a new run.folder"
            )
        return [[by_id[name] for name in pack] for pack in packs]

    def _drift(self, rollouts: Sequence[Rollout]) -> float | None:
        """KL(current || generator) on what is about to be trained on, where a version may follow this step."""
        since = self.cursor["step"] + 1 - self.cursor["published_at"]
        if since % self.pacing.stream.shortest_interval or not rollouts:
            return None
        batches = make_generated(
            rollouts,
            pack_tokens=self.stage.config.pack_tokens,
            device=self.device,
            multiple_of=self._mesh.row_multiple,
        )[: self._mesh.dp]  # one pack a replica is enough to know
        total = torch.zeros((), device=self.device)
        for batch in batches[self._mesh.dp_rank :: self._mesh.dp]:
            total += drift_sum(self._model, batch, self._run.config.kernels.loss)
        drift = float(self._mesh.sum_over_dp(total)) / sum(len(batch.logprobs_A) for batch in batches)
        self._training.log(self.cursor["step"], train__drift=drift)
        return drift

    def _is_time(self, drift: float | None) -> bool:
        stream, since = self.pacing.stream, self.cursor["step"] - self.cursor["published_at"]
        drifted = drift is not None and stream.publish_at_kl is not None and drift > stream.publish_at_kl
        return (since >= stream.publish_every or drifted) and self.cursor["step"] < self.pacing.steps

    def _publish(self) -> None:
        """A checkpoint first, so that a trainer that starts again is never older than what it published."""
        started = time.perf_counter()
        self.cursor |= {"version": self.cursor["version"] + 1, "published_at": self.cursor["step"]}
        self._keep()
        self._training.checkpoints.wait()
        self._publish_once()
        self.offer()
        seconds = time.perf_counter() - started
        self._training.log(self.cursor["step"], publish__version=self.cursor["version"], publish__busy_s=seconds)

    def offer(self) -> None:
        """The newest version from memory too, where a sender is open."""
        if self.sender and self.cursor["version"]:
            self.sender.offer(self.cursor["version"], self._model, self._mesh)

    def _publish_once(self) -> None:
        version = self.cursor["version"]
        if version == 0 or self._mesh.from_first(version in self._run.weights.versions()):
            return
        publish(self._run, version, self._model, self._mesh, step=self.cursor["published_at"])
        if self._mesh.rank == 0:
            # nothing that is generated or not yet scored is older than max_lag, and a worker that starts may be loading
            # the version before the newest; version 0 is evaluated in the end
            self._run.weights.drop_between(1, version - max(1, self.pacing.stream.max_lag))

    def _is_measured(self) -> bool:
        """Between the first step and the last, before and after which it is measured anyway."""
        every, step = self._run.config.evaluate.every_steps, self.cursor["step"]
        due = step % every == 0 if every else step == self.cursor["published_at"]
        return due and step < self.pacing.steps

    def _measure_heldout(self) -> None:
        if self._heldout is None:
            self._heldout = self._read_heldout()
        epoch = self.cursor["step"] / self.pacing.steps * self.stage.epochs
        self._training.measure(self._heldout, self.cursor["step"], epoch)

    def _read_heldout(self) -> Heldout:
        return heldout_in_shards(self._run, self.pacing.heldout, self._mesh)


def _written_packs(run: RunFolder) -> dict[int, list[list[str]]]:
    """Steps that were begun, from packs.jsonl; a torn last line never was."""
    if not run.packs.exists():
        return {}
    rows = [json.loads(line) for line in run.packs.read_text().split("\n")[:-1]]
    return {row["step"]: row["packs"] for row in rows}
