"""Run by test_planner.py in a process of its own: the peak of real training steps above what importing them took.

python tests/measured_step.py '<JSON of case>'       prints bytes
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from peak import peak_bytes

from npd_ascend.checkpoint import Checkpoints
from npd_ascend.config import GrpoConfig, OptimizerConfig
from npd_ascend.device import DTYPES
from npd_ascend.model.decoder import PLAIN, Decoder, initialise
from npd_ascend.model.families import DecoderConfig
from npd_ascend.records import Sample
from npd_ascend.trainer.objectives import Objective, make_batch, weight_sum, with_reference
from npd_ascend.trainer.optimizer import MasterAdamW
from npd_ascend.trainer.step import train_step

SAMPLE_TOKENS, PROMPT_TOKENS = 256, 64


def steps(
    config: DecoderConfig, dtype: torch.dtype, pack_tokens: int, recompute: str, packs: int, objective: Objective
) -> MasterAdamW:
    """An update of one sample, which makes the moments, and one of `packs` packs, with the targets of `objective`."""
    model = _model(config, dtype, recompute)
    reference = _model(config, dtype, recompute).requires_grad_(False) if objective.grpo else None
    optimizer = MasterAdamW(model, OptimizerConfig())
    every_sample = _samples(config.vocab_size, pack_tokens)
    for samples, number in ((every_sample[:1], 1), (every_sample, packs)):
        batches = [make_batch(samples, objective, torch.device("cpu")) for _ in range(number)]
        if reference:
            batches = [with_reference(batch, reference, objective) for batch in batches]
        train_step(model, batches, optimizer, objective, weight_sum=number * weight_sum(samples, objective), lr=1e-5)
    return optimizer


def _model(config: DecoderConfig, dtype: torch.dtype, recompute: str) -> Decoder:
    with torch.device("meta"):
        model = Decoder(config, PLAIN, recompute)
    model = model.to(dtype).to_empty(device="cpu")
    initialise(model, 0)
    return model


def checkpoint(optimizer: MasterAdamW) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        checkpoints.save({"step": 2}, optimizer.rectangles(copies=False))
        checkpoints.wait()


def _samples(vocab_size: int, pack_tokens: int) -> list[Sample]:
    random = np.random.Generator(np.random.PCG64(0))
    answer = SAMPLE_TOKENS - PROMPT_TOKENS
    return [
        Sample(
            sample_id=f"s{i}",
            token_ids=tuple(random.integers(0, vocab_size, SAMPLE_TOKENS).tolist()),
            prompt_len=PROMPT_TOKENS,
            teacher_topk_ids=random.integers(0, vocab_size, (answer, 10)).astype(np.int32),
            teacher_topk_logprobs=np.log(random.dirichlet(np.ones(10), answer)).astype(np.float32),
            advantage=1.0 - 2 * (i % 2),
            generator_logprobs=np.full(answer, -np.log(vocab_size), np.float32),
        )
        for i in range(pack_tokens // SAMPLE_TOKENS)
    ]


def main() -> None:
    case = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    dtype, recompute = DTYPES[case["dtype"]], case["recompute"]
    # of NPD, or of GRPO with a reference
    objective = Objective(grpo=GrpoConfig(kl_weight=0.1)) if case["grpo"] else Objective(lambda_=0.9)
    small = DecoderConfig(**case["config"] | {"num_layers": 1, "vocab_size": 512})
    checkpoint(
        steps(small, dtype, SAMPLE_TOKENS, recompute, 1, objective)
    )  # the libraries' own buffers, and what recomputing imports
    made: list[MasterAdamW] = []
    config, packs = DecoderConfig(**case["config"]), (case["pack_tokens"], recompute, case["packs"])
    step_bytes = peak_bytes(lambda: made.append(steps(config, dtype, *packs, objective)))
    print(json.dumps({"step": step_bytes, "checkpoint": peak_bytes(lambda: checkpoint(made[0]))}))


if __name__ == "__main__":
    main()
