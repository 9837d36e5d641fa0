"""How close a packed training step comes to the bound of its matrix products, and what the loss holds in memory.

    python benchmarks/train_step.py [--dtype float32|bfloat16] [--threads N] [--steps N]

Model: the shape of SmolLM2-135M (random weights), one pack of 2,048 tokens, NPD objective with top-10 targets.
Bound: the step's GEMM flops (6 per weight and token in every projection, 6 per head weight and answer token;
attention, norms, softmax, optimizer count as zero work) over the GEMM rate measured in this process between the
steps, best of several 2,048-cubed products of the same dtype. Prints one JSON object; the machine is noisy, so
the ratio counts and not the seconds.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from peak import peak_bytes

from npd_ascend.config import OptimizerConfig
from npd_ascend.device import DTYPES
from npd_ascend.model.load import load_decoder
from npd_ascend.planner.rates import gemm_rate
from npd_ascend.records import Sample
from npd_ascend.trainer.objectives import Objective, make_batch, weight_sum
from npd_ascend.trainer.optimizer import MasterAdamW
from npd_ascend.trainer.step import train_step

SMOLLM2_135M = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
PACK_TOKENS = 2048
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--loss-memory", type=int, metavar="TOKENS", help=argparse.SUPPRESS)
    parser.add_argument("--hidden", type=int, default=576, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.loss_memory:
        print(loss_peak_bytes(args.loss_memory, args.hidden, DTYPES[args.dtype]))
        return
    row = {"threads": args.threads, "dtype": args.dtype, "torch": torch.__version__, "machine": platform.machine()}
    row |= step_against_bound(DTYPES[args.dtype], args.steps)
    row["loss_peak_mb"] = {
        f"{tokens} tokens": round(_loss_peak_of_a_fresh_process(tokens, args) / 2**20) for tokens in (1024, 2048, 4096)
    }
    row["full_logits_mb"] = {f"{tokens} tokens": tokens * 49152 * 4 // 2**20 for tokens in (1024, 2048, 4096)}
    print(json.dumps(row, indent=2))


def step_against_bound(dtype: torch.dtype, steps: int) -> dict:
    """Best step time, best GEMM rate, both taken in turn so that both see the same machine."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SMOLLM2_135M))
        model = load_decoder(Path(folder), seed=0, dtype=dtype, device=CPU)
    optimizer, objective = MasterAdamW(model, OptimizerConfig()), Objective(lambda_=0.9)
    samples = _samples()
    batch = make_batch(samples, objective, CPU)
    step_s, rate = [], []
    for _ in range(steps + 1):
        rate.append(gemm_rate(dtype, 2048, repeats=5))
        started = time.perf_counter()
        train_step(model, [batch], optimizer, objective, weight_sum=weight_sum(samples, objective), lr=1e-5)
        step_s.append(time.perf_counter() - started)
    projections = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and not n.startswith("embed"))
    flops = 6 * projections * len(batch.layout.token_ids_T) + 6 * model.head_weight_VD.numel() * len(
        batch.layout.answer_ids_A
    )
    bound_s = flops / max(rate)
    return {
        "samples": len(batch.layout.answer_lens),
        "tokens": len(batch.layout.token_ids_T),
        "answer_tokens": len(batch.layout.answer_ids_A),
        "gemm_tflop": round(flops / 1e12, 3),
        "gemm_gflops_per_s": round(max(rate) / 1e9, 1),
        "bound_s": round(bound_s, 3),
        "step_s": round(min(step_s[1:]), 3),
        "ratio": round(bound_s / min(step_s[1:]), 3),
        "tokens_per_s": round(len(batch.layout.token_ids_T) / min(step_s[1:])),
    }


def _samples() -> list[Sample]:
    """Samples of GSM8K-like length that fill one pack: prompts of 40 to 120 tokens, answers about twice as long."""
    random = np.random.Generator(np.random.PCG64(0))
    samples, room = [], PACK_TOKENS
    while room >= 2:
        length = min(room, int(np.clip(random.lognormal(5.3, 0.4), 64, 512)))
        prompt_len = min(length - 1, max(1, length // 3))
        answer_len = length - prompt_len
        logprobs = np.log(random.dirichlet(np.ones(10) * 0.3, answer_len) + 1e-6).astype(np.float32)
        samples.append(
            Sample(
                sample_id=f"s{len(samples)}",
                token_ids=tuple(random.integers(0, 49152, length).tolist()),
                prompt_len=prompt_len,
                teacher_topk_ids=random.integers(0, 49152, (answer_len, 10)).astype(np.int32),
                teacher_topk_logprobs=logprobs,
            )
        )
        room -= length
    return samples


def loss_peak_bytes(tokens: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Peak memory of one loss and its gradients, the gradients included."""
    from npd_kernels.token_loss import token_loss

    hidden = torch.randn(tokens, hidden_size).to(dtype).requires_grad_()
    weight = torch.randn(49152, hidden_size).to(dtype).requires_grad_()
    ids, weights = torch.randint(49152, (tokens, 11)), torch.rand(tokens, 11)
    torch.mm(hidden[:64].detach(), weight[:64].detach().T)  # the libraries' own buffers

    def step():
        loss_sum, _ = token_loss(hidden, weight, ids, weights, torch.ones(tokens), impl="chunked")
        loss_sum.backward()

    return peak_bytes(step)


def _loss_peak_of_a_fresh_process(tokens: int, args: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--loss-memory", str(tokens), "--dtype", args.dtype]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
