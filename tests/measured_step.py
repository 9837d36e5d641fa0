"""For test_planned_memory.py, in its own process: the peak of real training steps above what importing them took.

python tests/measured_step.py '<JSON of case>' [RANK STORE]      prints bytes; with RANK: of that one of tp x dp ranks
"""

import json
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from peak import peak_bytes

from npd_ascend.checkpoint import Checkpoints
from npd_ascend.config import GrpoConfig, OptimizerConfig
from npd_ascend.device import DTYPES
from npd_ascend.model.decoder import PLAIN, Decoder, initialise
from npd_ascend.model.families import DecoderConfig
from npd_ascend.parallel.mesh import ALONE, Mesh, make_mesh
from npd_ascend.parallel.plan import cut_model
from npd_ascend.records import Sample
from npd_ascend.trainer.objectives import Objective, make_batch, weight_sum, with_reference
from npd_ascend.trainer.optimizer import MasterAdamW
from npd_ascend.trainer.step import train_step
from npd_ascend.weights.collective import open_group
from npd_ascend.weights.receiver import WeightReceiver
from npd_ascend.weights.sender import open_sender

SAMPLE_TOKENS, PROMPT_TOKENS = 256, 64


def steps(
    config: DecoderConfig,
    dtype: torch.dtype,
    pack_tokens: int,
    recompute: str,
    packs: int,
    objective: Objective,
    mesh: Mesh,
) -> MasterAdamW:
    """An update of one sample, which makes the moments, and one of `packs` packs, with the targets of `objective`."""
    model = _model(config, dtype, recompute, mesh)
    reference = _model(config, dtype, recompute, mesh).requires_grad_(False) if objective.grpo else None
    optimizer = MasterAdamW(model, OptimizerConfig(), mesh)
    every_sample = _samples(config.vocab_size, pack_tokens)
    for samples, number in ((every_sample[:1], 1), (every_sample, packs)):
        batches = [make_batch(samples, objective, torch.device("cpu")) for _ in range(number)]
        if reference:
            batches = [with_reference(batch, reference, objective) for batch in batches]
        weight = mesh.dp * number * weight_sum(samples, objective)
        train_step(model, batches, optimizer, objective, weight_sum=weight, lr=1e-5, mesh=mesh)
    return optimizer


def _model(config: DecoderConfig, dtype: torch.dtype, recompute: str, mesh: Mesh) -> Decoder:
    with torch.device("meta"):
        model = Decoder(config, PLAIN, recompute)
    cut_model(model, mesh)
    model = model.to(dtype).to_empty(device="cpu")
    initialise(model, 0)
    return model


def checkpoint(optimizer: MasterAdamW) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        checkpoints.save({"step": 2}, optimizer.rectangles(copies=False))
        checkpoints.wait()


def offer_twice(model: Decoder) -> None:
    """rollout.weights: memory, where a worker does not take the first version before the second is there."""
    with tempfile.TemporaryDirectory() as name, open_sender(Path(name), torch.float32, timeout_s=60) as sender:
        sender.offer(1, model)
        receiver = WeightReceiver(Path(name), "slow", timeout_s=60)
        group = open_group(receiver.connect(ranks=1), rank=1)
        receiver.manifest(1)
        sender.offer(2, model)
        receiver.hang_up()
        del group


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
    mesh = _mesh(case["tp"], case["dp"], int(sys.argv[2]), sys.argv[3]) if sys.argv[2:] else ALONE
    small = DecoderConfig(**case["config"] | {"num_layers": 1, "vocab_size": 512})
    warm = steps(small, dtype, SAMPLE_TOKENS, recompute, 1, objective, mesh)
    if mesh is ALONE:
        checkpoint(warm)  # the libraries' own buffers, and what recomputing imports
        offer_twice(_model(small, dtype, recompute, mesh))
    del warm
    made: list[MasterAdamW] = []
    config, packs = DecoderConfig(**case["config"]), (case["pack_tokens"], recompute, case["packs"])
    found = {"step": peak_bytes(lambda: made.append(steps(config, dtype, *packs, objective, mesh)))}
    if mesh is ALONE:
        found["checkpoint"] = peak_bytes(lambda: checkpoint(made[0]))
        model = _model(config, dtype, recompute, mesh)
        found["transfer"] = peak_bytes(lambda: offer_twice(model))
    else:
        mesh.barrier()
        dist.destroy_process_group()
    print(json.dumps(found))


def _mesh(tp: int, dp: int, rank: int, store: str) -> Mesh:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=tp * dp)
    return make_mesh(tp, dp, rank, sequence_parallel=False, timeout=timedelta(seconds=200))


if __name__ == "__main__":
    main()
