"""The kernels against their bounds and against the best public ones, forward and backward together.

    python benchmarks/kernels.py [--device cpu|cuda|npu] [--dtype float32|bfloat16] [--only attention|loss|divergence]

Sizes: openPangu-Embedded-1B (hidden 1536, vocabulary 153,376, 12 query and 6 key heads of 128), 10 teacher targets and
the given token. A GPU or NPU gets packs of 32,768 tokens, a CPU smaller ones. Contestants take turns in one process and
the best time of each counts. The bound is that of the matrix products that cannot be avoided, timed in the same rounds:
`of bound` = bound / time. Errors are against plain code in the same run, relative to the largest value.

What is not installed or does not run on the device is named with the reason; one of ours that fails does not end the
others, but with code 1 in the end. The public kernels come with
    pip install liger-kernel==0.8.5 cut-cross-entropy==25.1.1
Prints a JSON object; times on a shared machine count as ratios only.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable

import torch
from kernel_contestants import ATTENTION, DIVERGENCE, LOSS, Heads, make_heads, make_pack
from peak import peak_bytes

from npd_ascend.device import open_device
from npd_kernels.streaming import CHUNK_BYTES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda", "npu"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on cpu, else bfloat16")
    parser.add_argument("--only", choices=["attention", "loss", "divergence"])
    parser.add_argument("--tokens", type=int, help="of the loss and the divergence; default: 512 on cpu, else 8192")
    parser.add_argument("--pack-tokens", type=int, help="of the attention; default: 4096 on cpu, else 32768")
    parser.add_argument("--vocabulary", type=int, default=153_376)
    parser.add_argument("--chunk-mib", type=int, help="of float32 logits; default: npd_kernels.streaming's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak-of", nargs=2, metavar=("SHAPE", "NAME"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.device == "npu":
        open_device(args.device, 0)  # brings torch_npu
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    args.tokens = args.tokens or (512 if args.device == "cpu" else 8192)
    args.pack_tokens = args.pack_tokens or (4096 if args.device == "cpu" else 32768)
    if args.chunk_mib:
        CHUNK_BYTES[args.device] = args.chunk_mib * 2**20
    cases = shapes(args)
    if args.peak_of:
        shape, name = args.peak_of
        print(_peak_of_this_process(*cases[shape], name))
        return
    on_cpu = args.device == "cpu"
    where = f"cpu, {args.threads} threads" if on_cpu else torch.get_device_module(args.device).get_device_name()
    result = {"device": where, "dtype": args.dtype, "torch": torch.__version__}
    for shape, (contestants, make, bound) in cases.items():
        result[shape] = compare(shape, contestants, make(), bound, args)
    print(json.dumps(result, indent=2))
    if any("failed" in result[shape][name] for shape, (contestants, *_) in cases.items() for name in contestants):
        sys.exit(1)


def shapes(args: argparse.Namespace) -> dict[str, tuple[dict, Callable, Callable]]:
    """name -> (contestants, how to make the inputs, seconds of the bound given the inputs)"""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    sample = 256 if args.pack_tokens <= 4096 else 4096
    samples = args.pack_tokens // sample
    packs = {f"{samples} of {sample:,}": [sample] * samples}
    packs[f"GSM8K-like, {args.pack_tokens:,} tokens"] = gsm8k_like(args.pack_tokens)
    cases: dict = {
        f"attention, {name}": (
            ATTENTION,
            lambda lengths=lengths: make_pack(lengths, device, dtype),
            lambda pack: pack.flops / _gemm_flops_per_s(device, dtype, min(8192, args.pack_tokens // 2)),
        )
        for name, lengths in packs.items()
    }
    size = f"{args.tokens:,} tokens, vocabulary {args.vocabulary:,}"
    heads = lambda: make_heads(args.tokens, args.vocabulary, device, dtype)  # noqa: E731
    cases[f"loss, {size}"] = (LOSS, heads, lambda x: _head_seconds(x, products=3))
    cases[f"divergence, {size}"] = (DIVERGENCE, heads, lambda x: _head_seconds(x, products=4))
    return {name: case for name, case in cases.items() if args.only is None or name.startswith(args.only)}


def gsm8k_like(tokens: int) -> list[int]:
    """Lengths of questions with answers: log-normal, median 200, 64 to 512 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while (room := tokens - sum(lengths)) > 0:
        length = int((5.3 + 0.4 * torch.randn((), generator=generator)).exp().clamp(64, 512))
        lengths.append(min(room, length))
    return lengths


def compare(shape: str, contestants: dict, inputs, bound: Callable, args: argparse.Namespace) -> dict:
    rows, steps, truth = {}, {}, None
    for name, build in contestants.items():
        try:
            step = build(inputs)
            values = step()
            _synchronise(args.device)  # what fails on the device says so here
        except Exception as error:  # a library may say in any way that it cannot; ours has one
            said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            # full masks or logits may well be too large for a card
            excused = "cannot run here" in said or (name.startswith("plain") and "out of memory" in said)
            failed = name.startswith(("npd", "plain")) and not excused
            rows[name] = {"failed" if failed else "not run": said}
            if failed:
                traceback.print_exc()
            continue
        if name.startswith("plain"):
            truth = [value.double() for value in values]
        steps[name], rows[name] = step, {}
        if truth and not name.startswith("hard labels"):
            errors = zip(values, truth, strict=True)
            rows[name]["error"] = f"{max(float((v.double() - t).abs().max() / t.abs().max()) for v, t in errors):.1e}"
        del values
    bounds, seconds = [], {name: [] for name in steps}
    for _ in range(args.rounds):
        bounds.append(bound(inputs))
        for name, step in steps.items():
            seconds[name].append(_seconds(step, args.device))
    for name, step in steps.items():
        best = min(seconds[name])
        rows[name] |= {"ms": _ms(best), "of bound": round(min(bounds) / best, 3)}
        if truth:
            rows[name]["times plain"] = round(min(next(iter(seconds.values()))) / best, 2)
        rows[name]["peak MB"] = round(_peak_bytes(shape, name, step, args) / 2**20)
    return {"bound ms": _ms(min(bounds)), **rows}


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 2)


def _seconds(step: Callable, device: str) -> float:
    """Of one call, the device waited for."""
    _synchronise(device)
    started = time.perf_counter()
    step()
    _synchronise(device)
    return time.perf_counter() - started


def _synchronise(device: str) -> None:
    if device != "cpu":
        torch.get_device_module(device).synchronize()


def _gemm_flops_per_s(device: torch.device, dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    return 2 * size**3 / min(_seconds(lambda: a @ b, device.type) for _ in range(5))


@torch.no_grad()
def _head_seconds(x: Heads, products: int) -> float:
    """Logits and the two gradients in whole products, and the teacher's logits for a divergence."""
    logits = x.hidden @ x.weight.T
    work = [lambda: x.hidden @ x.weight.T, lambda: logits @ x.weight, lambda: logits.T @ x.hidden]
    work += [lambda: x.teacher_hidden @ x.teacher_weight.T] * (products - 3)
    return sum(_seconds(product, x.hidden.device.type) for product in work)


def _peak_bytes(shape: str, name: str, step: Callable, args: argparse.Namespace) -> int:
    """What one call holds at most above its inputs, gradients included; on CPU in a process of its own."""
    if args.device != "cpu":
        device = torch.get_device_module(args.device)
        device.reset_peak_memory_stats()
        before = device.memory_allocated()
        step()
        return device.max_memory_allocated() - before
    options = [f"--{key}={getattr(args, key)}" for key in ("device", "dtype", "tokens", "vocabulary", "threads")]
    options += [f"--pack-tokens={args.pack_tokens}"]
    options += [f"--chunk-mib={args.chunk_mib}"] if args.chunk_mib else []
    command = [sys.executable, __file__, *options, "--peak-of", shape, name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _peak_of_this_process(contestants: dict, make: Callable, bound: Callable, name: str) -> int:
    step = contestants[name](make())
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # the libraries' own buffers
    return peak_bytes(step)


if __name__ == "__main__":
    main()
