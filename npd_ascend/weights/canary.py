"""Whether who generates has the weights that were published: log-probs of fixed tokens, by the trainer and by it.

Wrong weights, a stale key cache, a lost bias or another rotary base all move them by far more than rounding does, and
nothing else in a run would say so: it would only learn worse.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from npd_ascend.errors import UserError

_FILE = "canary.json"


@dataclass(frozen=True, slots=True)
class Probe:
    context: tuple[int, ...]  # token ids
    next_id: int
    logprob: float  # of next_id after context, nats, temperature 1, by the trainer


def write_probes(probes: Sequence[Probe], folder: Path) -> None:
    """Into the folder of a weight version, before it is committed."""
    (folder / _FILE).write_text(json.dumps([asdict(probe) for probe in probes]) + "\n")


def read_probes(folder: Path) -> list[Probe]:
    """None for weights that no trainer published here: a student as it was given."""
    if not (folder / _FILE).exists():
        return []
    return [
        Probe(tuple(row["context"]), row["next_id"], row["logprob"]) for row in json.loads((folder / _FILE).read_text())
    ]


def compare(probes: Sequence[Probe], logprobs: np.ndarray, tolerance: float, folder: Path) -> float:
    """Mean absolute difference in nats; UserError with the evidence if it is past `tolerance`, or no number."""
    wanted = np.array([probe.logprob for probe in probes])
    differences = np.abs(np.asarray(logprobs, np.float64) - wanted)
    mean, worst = float(differences.mean()), int(differences.argmax())
    if not mean <= tolerance:
        raise UserError(
            f"{folder}: canary: the generator does not have these weights. Over {len(probes)} tokens its log-probs are "
            f"{mean:.3g} nats from the trainer's on average, {tolerance:g} is rounding; worst: token "
            f"{probes[worst].next_id} after {len(probes[worst].context)} tokens, {logprobs[worst]:.4f} and not "
            f"{wanted[worst]:.4f}. Report it with this line; if rollout.engine is vllm, hf does without it meanwhile"
        )
    return mean
