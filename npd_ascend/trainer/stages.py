"""SFT, NPD and GRPO as stages of a run: what they train on, from which weights, and what they publish."""

import logging
from collections import Counter

from npd_ascend.config import Phase
from npd_ascend.errors import UserError
from npd_ascend.filters import REASONS
from npd_ascend.model.decoder import Decoder
from npd_ascend.parallel.mesh import Mesh
from npd_ascend.runfolder import RunFolder
from npd_ascend.trainer.grpo import train_grpo
from npd_ascend.trainer.live import train_live
from npd_ascend.trainer.loop import fit
from npd_ascend.trainer.objectives import Objective, npd_objective
from npd_ascend.trainer.samples import gold_samples, heldout_references, kept_samples, read_heldout_set
from npd_ascend.trainer.student import hand_on, load_student, open_metrics, open_ranks, publish, start_student

_log = logging.getLogger(__name__)


def run_sft(run: RunFolder) -> bool:
    """Train on gold answers; the student is weight version 0 of what follows, or the final one if the run ends here.

    Called by every rank of the trainer, as run_distill and run_grpo are; all return False if there was nothing to do.
    """
    with open_ranks(run.config) as mesh:
        return _sft(run, mesh)


def _sft(run: RunFolder, mesh: Mesh) -> bool:
    config = run.config
    if config.sft is None:
        raise UserError(f"{run.path}/config.yaml: no sft section, so there is no SFT to run")
    if run.has_trained("sft") or run.student.exists():
        return False
    tokenizer = run.tokenizer()
    samples = gold_samples(config, tokenizer)
    model = start_student(config, mesh)
    objective = Objective(normalise=config.sft.normalise, loss_impl=config.kernels.loss)
    with open_metrics(run, "sft", mesh) as metrics:
        fit(
            model,
            samples,
            objective,
            config.sft,
            mesh=mesh,
            epochs=(0, config.sft.epochs),
            seed=config.run.seed,
            checkpoints=run.checkpoints / "sft",
            metrics=metrics,
            heldout=heldout_references(config, config.sft, mesh),
            measure_every=config.evaluate.every_steps,
        )
    hand_on(run, "sft", model, mesh)
    return True


def run_distill(run: RunFolder) -> bool:
    """Train every NPD phase whose rollouts are decided; publish after each, export after the last."""
    run.needs_npd()
    with open_ranks(run.config) as mesh:
        if run.config.npd.stream:
            return train_live(run, mesh)
        return _distill(run, mesh)


def run_grpo(run: RunFolder) -> bool:
    """Train every step of GRPO beside who answers and judges; export after the last."""
    run.for_grpo()
    with open_ranks(run.config) as mesh:
        return train_grpo(run, mesh)


def _distill(run: RunFolder, mesh: Mesh) -> bool:
    run.tokenizer()  # compared with the stream's before anything is trained on its ids
    config, worked = run.config, False
    plan = config.npd.phases
    for phase in plan:
        finished = run.has_trained("npd") if phase is plan[-1] else phase.number + 1 in run.weights.versions()
        if finished:
            continue
        if not run.stream.entries("decisions", phase.number):
            if phase.number == 0:
                raise UserError(f"{run.stream.folder}: nothing is scored yet; run `npd rollout` and `npd score` first")
            _log.info("next: npd rollout and npd score, --run %s --set %d", run.path, phase.number)
            return worked
        model, worked = _train_phase(run, phase, mesh), True
        if phase is plan[-1]:
            hand_on(run, "npd", model, mesh)
        else:
            publish(run, phase.number + 1, model, mesh)
        if config.npd.overlap:
            return True  # the set after the next can be generated now
    return worked


def _train_phase(run: RunFolder, phase: Phase, mesh: Mesh) -> Decoder:
    config = run.config
    samples, heldout = kept_samples(run, phase.number), read_heldout_set(run, phase.number, mesh)
    if not samples:
        reasons = Counter(decision.reason for decision in run.stream.read("decisions", phase.number))
        most, count = (reasons - Counter(heldout=reasons["heldout"])).most_common(1)[0]
        raise UserError(
            f"{run.stream.folder}: the filters kept none of the rollouts of set {phase.number}; {count} went for "
            f"{most} ({REASONS[most]}); start a new run.folder with another setting of that"
        )
    model = load_student(config, run.generator(phase.number), mesh)
    objective = npd_objective(config)
    with open_metrics(run, "npd", mesh) as metrics:
        fit(
            model,
            samples,
            objective,
            config.npd,
            mesh=mesh,
            epochs=(phase.first, phase.last),
            seed=config.run.seed,
            checkpoints=run.checkpoints / "npd",
            metrics=metrics,
            heldout=heldout,
            measure_every=config.evaluate.every_steps,
        )
    return model
