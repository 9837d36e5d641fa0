"""The student in the trainer: whose weights it starts from, the ranks that hold it, how a version is published."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from npd_ascend.config import Config
from npd_ascend.device import DTYPES, open_device
from npd_ascend.metrics import MetricsLog
from npd_ascend.model.decoder import Decoder
from npd_ascend.model.load import choose_kernels, load_decoder
from npd_ascend.parallel.mesh import ALONE, Mesh, open_mesh
from npd_ascend.parallel.plan import cut_model
from npd_ascend.prompts import read_heldout
from npd_ascend.runfolder import RunFolder
from npd_ascend.trainer.canary import make_probes
from npd_ascend.weights.export import export


def start_student(config: Config, mesh: Mesh = ALONE) -> Decoder:
    """This rank's part of the student before anything was trained."""
    return load_student(config, None if config.student.init == "random" else config.student.path, mesh)


def load_student(config: Config, weights: Path | None, mesh: Mesh) -> Decoder:
    """This rank's part of the student with the weights of a folder, or fresh ones from the run's seed."""
    device = open_device(config.device.kind, config.device.threads)
    return load_decoder(
        weights or config.student.path,
        seed=None if weights else config.run.seed,
        dtype=DTYPES[config.student.dtype],
        device=device,
        kernels=choose_kernels(config.kernels, device),
        recompute=config.parallel.recompute,
        cut=partial(cut_model, mesh=mesh),
    )


@contextmanager
def open_ranks(config: Config) -> Iterator[Mesh]:
    """This process among the ranks of the trainer."""
    parallel = config.parallel
    device = open_device(config.device.kind, config.device.threads)
    with open_mesh(
        parallel.tp,
        parallel.dp,
        sequence_parallel=parallel.sequence_parallel,
        device=device,
        timeout_s=parallel.timeout_s,
    ) as mesh:
        yield mesh


def publish(run: RunFolder, version: int, model: Decoder, mesh: Mesh, *, step: int = 0) -> None:
    """Make the weights `version`, with a canary; step: of NPD. Called by all ranks."""
    config = run.config
    prompts = read_heldout(config, run.tokenizer(), config.rollout.max_new_tokens)
    probes = make_probes(model, prompts, config.kernels.loss, mesh)
    run.weights.publish(version, model, config.student.path, probes, mesh, step=step)


def hand_on(run: RunFolder, stage: str, model: Decoder, mesh: Mesh) -> None:
    """The student after `stage`: version 0 of what follows, or RUN/student. Called by all ranks."""
    following = run.after(stage)
    if following is None:
        export(run.student, model, run.config.student.path, mesh)
    else:
        publish(following, 0, model, mesh)


@contextmanager
def open_metrics(run: RunFolder, stage: str, mesh: Mesh) -> Iterator[MetricsLog | None]:
    """The log on rank 0, None on the others."""
    if mesh.rank > 0:
        yield None
        return
    metrics = MetricsLog(run.path, stage)
    try:
        yield metrics
    finally:
        metrics.close()
