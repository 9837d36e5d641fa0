"""One table of metric names; every process appends JSON lines, TensorBoard reads the same numbers."""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from npd_ascend.durable import append_line

# name -> (unit, meaning). A name that is not here cannot be logged.
METRICS = {
    "train/loss": ("nats/token", "objective of the step: sum over its answer tokens, divided once"),
    "train/grad_norm": ("", "global L2 norm before clipping"),
    "train/lr": ("", "learning rate of the step"),
    "train/answer_tokens": ("tokens", "answer tokens in the step"),
    "train/tokens": ("tokens", "tokens in the step, prompts included"),
    "train/tokens_per_s": ("tokens/s", "tokens over the wall time of the step"),
    "train/epoch": ("epochs", "epochs done, fractions included"),
    "train/wait_s": ("s", "that the step waited for its samples to be generated and scored"),
    "train/busy_s": ("s", "of the step itself"),
    "train/lag": ("versions", "by which the generators of the step's samples were behind the newest version, mean"),
    "train/lag_max": ("versions", "the same, most"),
    "train/drift": ("nats/token", "KL(current || generator) on samples of the step, estimator r log r - r + 1"),
    "grpo/reward": ("", "mean over the answers of a step whose reward is known"),
    "grpo/no_signal": ("share", "groups of a step with one and the same reward, which are not trained on"),
    "grpo/failed": ("share", "answers of a step whose reward function raised or was stopped"),
    "grpo/answer_tokens": ("tokens", "in an answer of a step, mean"),
    "grpo/clipped": ("share", "tokens of the step whose ratio to the generator was clipped"),
    "grpo/kl": ("nats/token", "KL(current || student before GRPO) on what is trained on, estimator k3; with kl_weight"),
    "grpo/entropy": ("nats/token", "mean -log p of the sampled tokens that are trained on, an estimate of the entropy"),
    "reward/samples": ("samples", "answers of a shard that were judged"),
    "reward/failed": ("samples", "those whose reward function raised or was stopped"),
    "reward/timeouts": ("samples", "those whose reward function was stopped"),
    "reward/busy_s": ("s", "judging a shard"),
    "reward/wait_s": ("s", "that the rewards waited for a shard"),
    "publish/version": ("", "weight version that was published"),
    "publish/busy_s": ("s", "of publishing it: checkpoint, canary, gathering from the ranks, writing"),
    "heldout/kl_teacher": ("nats/token", "KL(teacher || student) on held-out rollouts of version 0, teacher's top-k"),
    "heldout/exact_match": ("share", "held-out prompts whose reference answer greedy decoding would give"),
    "heldout/answer_tokens": ("tokens", "in a greedy answer to a held-out prompt, mean; with evaluate.every_steps"),
    "heldout/entropy": ("nats/token", "of the student's distribution at the tokens of those answers, mean"),
    "heldout/busy_s": ("s", "of measuring what a row has of heldout/"),
    "heldout/drift": (
        "nats/token",
        "KL(current || generator) on held-out rollouts of the newest version, estimator r log r - r + 1",
    ),
    "heldout/version": ("", "weight version that generated the rollouts that drift is measured on"),
    "pack/fill": ("share", "tokens over room in the packs of a phase"),
    "pack/samples": ("samples", "samples trained on in a phase"),
    "rollout/samples": ("samples", "answers in a shard"),
    "rollout/resumed": ("samples", "those of them that a process had made which was killed before the shard's end"),
    "rollout/tokens": ("tokens", "answer tokens in a shard"),
    "rollout/answer_tokens": ("tokens", "in an answer of a shard, mean"),
    "rollout/entropy": (
        "nats/token",
        "mean -log p of a shard's sampled tokens, an estimate of the entropy; with rollout.temperature and top_p 1",
    ),
    "rollout/tokens_per_s": ("tokens/s", "answer tokens over wall time, without those that were there already"),
    "rollout/version": ("", "weight version that generated a shard"),
    "rollout/busy_s": ("s", "generating a shard"),
    "rollout/load_s": ("s", "loading weights and letting the canary look, before a shard"),
    "rollout/wait_s": ("s", "that a shard waited for the trainer, so that it would not be too old (back-pressure)"),
    "rollout/canary": ("nats", "generator's log-probs of fixed tokens against the trainer's, mean difference"),
    "sync/bytes": ("B", "of a version that came from the trainer (rollout.weights: memory, device)"),
    "sync/gather_s": ("s", "the trainer copying it"),
    "sync/wait_s": ("s", "until the trainer sends"),
    "sync/transfer_s": ("s", "to the worker, checksums compared; from device to device with most of the load"),
    "sync/load_s": ("s", "into the model"),
    "sync/reset_s": ("s", "of the prefix cache"),
    "score/samples": ("samples", "rollouts scored in a shard"),
    "score/tokens": ("tokens", "tokens through the teacher's conditional pass of a shard"),
    "score/tokens_per_s": ("tokens/s", "tokens through the teacher's conditional pass over wall time of the shard"),
    "score/busy_s": ("s", "scoring a shard"),
    "score/wait_s": ("s", "that the teacher waited for a shard"),
    "filter/kept": ("share", "kept over decided training rollouts"),
}


class MetricsLog:
    """Appends to RUN/metrics.jsonl and RUN/tensorboard/<stage>."""

    def __init__(self, run: Path, stage: str):
        from torch.utils.tensorboard import SummaryWriter  # two seconds; not every command logs

        self._path, self._stage = run / "metrics.jsonl", stage
        self._board = SummaryWriter(str(run / "tensorboard" / stage))

    def log(self, step: int, **values: float) -> None:
        """One row. Names are METRICS keys with '/' written as '__'."""
        named = {name.replace("__", "/"): float(value) for name, value in values.items()}
        if unknown := named.keys() - METRICS.keys():
            raise AssertionError(f"metrics without a unit: {sorted(unknown)}; add them to METRICS")
        row = {"time": time.time(), "stage": self._stage, "step": step} | named
        append_line(self._path, json.dumps(row), durable=False)
        for name, value in named.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


def parse_rows(text: str) -> Iterator[dict]:
    """Of lines of metrics.jsonl; one that a kill has torn is left out, since its step was repeated."""
    for line in text.splitlines():
        with suppress(json.JSONDecodeError):
            yield json.loads(line)


def read_metrics(run: Path) -> list[dict]:
    """Rows of RUN/metrics.jsonl; of a step that was repeated after a kill the last row stands."""
    path = Path(run) / "metrics.jsonl"
    rows: dict[tuple, dict] = {}
    for row in parse_rows(path.read_text() if path.exists() else ""):
        names = tuple(key for key in row if key not in ("time", "stage", "step"))
        # the end of one phase and the start of the next are the same step, measured on other rollouts
        rows[(row["stage"], row["step"], row.get("heldout/version"), names)] = row
    return list(rows.values())
