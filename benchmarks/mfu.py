"""Tokens a second and share of peak of a training step, and its memory against the plan.

    python benchmarks/mfu.py [--device cpu|npu] [--model 1B|tiny] [--pack-tokens N] [--recompute off|selective|full]

One rank; random weights in bfloat16 with float32 masters, NPD objective with top-10 targets, samples of 1,024 tokens of
which 75% are answer. MFU is 3 forwards over peak, whatever is computed again: 354 TFLOP/s for a 910B2
(npd_ascend/planner/rates.py), and on CPU the rate of products in the same process. Prints one JSON object. For memory
on CPU set MALLOC_MMAP_THRESHOLD_=262144, or the allocator keeps what is free.
"""

import argparse
import json
import time
from dataclasses import replace

import torch
from peak import peak_bytes
from scale import MODELS

from npd_ascend.config import KernelConfig, OptimizerConfig
from npd_ascend.device import open_device
from npd_ascend.model.decoder import Decoder, Kernels, initialise
from npd_ascend.packing import lay_out
from npd_ascend.planner.fused import countable
from npd_ascend.planner.memory import Layout, trainer_memory
from npd_ascend.planner.rates import ASCEND, this_host
from npd_ascend.trainer.objectives import Batch, Objective
from npd_ascend.trainer.optimizer import MasterAdamW
from npd_ascend.trainer.step import train_step

SAMPLE, PROMPT = 1024, 256
PANGU_1B = MODELS["openPangu-Embedded-1B"]
TINY = {"num_layers": 2, "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_heads": 2}
SHAPES = {"1B": PANGU_1B, "tiny": replace(PANGU_1B, **TINY, num_kv_heads=1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "npu"], default="cpu")
    parser.add_argument("--model", choices=list(SHAPES), default="1B")
    parser.add_argument("--pack-tokens", type=int, default=32768)
    parser.add_argument("--recompute", choices=["off", "selective", "full"], default="selective")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    device, shape = open_device(args.device, 0), SHAPES[args.model]
    fused = "npu" if args.device == "npu" else None
    config = KernelConfig(attention=fused or "sdpa", layer=fused or "torch")
    seconds, peak = measure(shape, device, Kernels(config.attention, config.layer), args)
    samples = args.pack_tokens // SAMPLE
    flops = 3 * shape.forward_flops([SAMPLE] * samples, samples * (SAMPLE - PROMPT))
    hardware = ASCEND if fused else this_host()
    # whose share of peak is that of a 910B2, whichever it is
    card = {"card": torch.get_device_module(device).get_device_name()} if fused else {}
    row = {"device": hardware.name, **card, "model": args.model, "pack_tokens": samples * SAMPLE}
    row["recompute"] = args.recompute
    row |= {"step_s": round(min(seconds), 3), "tokens_per_s": round(samples * SAMPLE / min(seconds))}
    row["mfu"] = round(flops / min(seconds) / hardware.flops[torch.bfloat16].value, 3)
    row |= {"peak_gib": round(peak / 2**30, 2), "planned_gib": round(planned(shape, config, args) / 2**30, 2)}
    print(json.dumps(row, indent=1))


def measure(shape, device: torch.device, kernels: Kernels, args: argparse.Namespace) -> tuple[list[float], int]:
    """Seconds of the steps after the first, and the peak of all."""
    seconds: list[float] = []

    def steps() -> None:
        with torch.device("meta"):
            model = Decoder(shape, kernels, args.recompute)
        model = model.bfloat16().to_empty(device=device)
        initialise(model, 0)
        optimizer, objective, batch = (
            MasterAdamW(model, OptimizerConfig()),
            Objective(lambda_=0.9),
            _batch(args, device),
        )
        answers = float(len(batch.layout.answer_ids_A))
        for _ in range(args.steps + 1):
            started = time.perf_counter()
            train_step(model, [batch], optimizer, objective, weight_sum=answers, lr=1e-5)  # ends with the loss here
            seconds.append(time.perf_counter() - started)

    if device.type == "cpu":
        peak = peak_bytes(steps)
    else:
        steps()
        peak = torch.get_device_module(device).max_memory_allocated()
    return seconds[1:], peak


def planned(shape, config: KernelConfig, args: argparse.Namespace) -> int:
    layout = Layout(tp=1, dp=1, sequence_parallel=False, recompute=args.recompute, pack_tokens=args.pack_tokens)
    answers = args.pack_tokens * (SAMPLE - PROMPT) // SAMPLE
    with countable(config) as kernels:
        memory = trainer_memory(
            "distill", shape, layout, torch.bfloat16, device=args.device, answer_tokens=answers, kernels=kernels
        )
    return memory.step


def _batch(args: argparse.Namespace, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    vocab = SHAPES[args.model].vocab_size
    rows = [
        (torch.randint(vocab, (SAMPLE,), generator=generator).tolist(), PROMPT)
        for _ in range(args.pack_tokens // SAMPLE)
    ]
    layout = lay_out(rows, device)
    answers = len(layout.answer_ids_A)
    ids = torch.randint(vocab, (answers, 11), generator=generator).to(device)
    probs = torch.rand(answers, 10, generator=generator).softmax(-1).to(device)
    return Batch(layout, ids, probs, torch.ones(answers, device=device))


if __name__ == "__main__":
    main()
