"""Rates that time is planned with, in one table: what was measured on this machine and what is assumed, and from where.

Times of a plan are as good as these. A card that has been measured (benchmarks/npu.sh) belongs here.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Rate:
    value: float
    unit: str
    source: str  # begins with "measured" or "assumed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One card, or one host of CPU cores that all ranks share."""

    name: str
    memory: Rate  # B, of a card or of the host
    idle: Rate  # B of it that are taken before anything runs
    flops: dict[torch.dtype, Rate]  # FLOP/s of matrix products
    train_share: dict[torch.dtype, Rate]  # of these, in training and prefill
    bus: Rate  # B/s between cards, each way
    # A step of decoding takes a fixed time at least, or that of its memory traffic, or that of its products; and then
    # every request draws its token with a seed of its own.
    decode_floor: Rate  # s
    decode_draw: Rate  # s of a request
    decode_memory: Rate  # B/s of weights and KV cache
    decode_share: Rate  # of flops
    shared: bool = False  # ranks share memory and flops

    def rows(self) -> list[tuple[str, Rate]]:
        """(name, rate) of all, for the table."""
        rows = [("memory", self.memory), ("of it taken when idle", self.idle)]
        for dtype, rate in self.flops.items():
            name = str(dtype).removeprefix("torch.")
            rows += [(f"products, {name}", rate), (f"share in training and prefill, {name}", self.train_share[dtype])]
        rows += [("between cards", self.bus), ("least time of a decode step", self.decode_floor)]
        rows.append(("drawing one request's token", self.decode_draw))
        return [*rows, ("decode, memory traffic", self.decode_memory), ("decode, share of products", self.decode_share)]


_SHARE = Rate(
    0.40,
    "",
    "assumed; MindSpeed-LLM 1.0.RC3 README, Atlas 900 A2 PODc: 28% (Qwen2-0.5B) to 57% (LLaMA2-7B), our arithmetic",
)
ASCEND = Hardware(
    name="Ascend 910B2, one of an Atlas 800T A2",
    memory=Rate(65536 * 2**20, "B", "measured by others; table of the driver's tool in vllm-ascend#1767"),
    idle=Rate(3400 * 2**20, "B", "measured by others; vllm-ascend#1767: 3,395 to 3,397 MB"),
    flops={
        torch.bfloat16: Rate(
            354e12, "FLOP/s", "assumed; 24 cores x 16^3 x 2 x 1.8 GHz; '353T' in cann/ops-transformer#5487"
        ),
        torch.float32: Rate(80e12, "FLOP/s", "measured by others; zzc0721/torch-performance-test-data#109: about 80"),
    },
    train_share={torch.bfloat16: _SHARE, torch.float32: _SHARE},
    bus=Rate(100e9, "B/s", "assumed; HCCS full mesh, no primary source found (392 GB/s is often quoted)"),
    decode_floor=Rate(
        0.017, "s", "measured by others; icode-pku/OpenPangu README: 1B, TP 1, 58 to 60 tokens/s of one request"
    ),
    decode_draw=Rate(
        7 * 5e-6,
        "s",
        "assumed; 7 launches (op-plugin 26.1.0, ExponentialKernelNpuOpApi.cpp) row by row (vllm-ascend 0.23.0, "
        "sampler.py), 5 us each",
    ),
    decode_memory=Rate(0.5 * 1.6e12, "B/s", "assumed; half of 1.6 TB/s (cann/ops-transformer#5487)"),
    decode_share=Rate(0.40, "", "assumed, as in prefill"),
)


def host_memory() -> int:
    """Bytes, whoever uses them."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def this_host() -> Hardware:
    """The CPU this runs on; its products are timed now, which takes a second."""
    ram = host_memory()
    free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    threads = torch.get_num_threads()
    return Hardware(
        name=f"this host, {threads} threads",
        memory=Rate(ram, "B", "measured now"),
        idle=Rate(ram - free, "B", "measured now"),
        flops={
            dtype: Rate(
                gemm_rate(dtype, 1536, repeats=3), "FLOP/s", "measured now, best of three products of 1,536 rows"
            )
            for dtype in (torch.float32, torch.bfloat16)
        },
        train_share={
            torch.float32: Rate(0.75, "", "assumed as measured for SmolLM2-135M's shape (benchmarks/README.md)"),
            torch.bfloat16: Rate(0.36, "", "assumed as measured for SmolLM2-135M's shape (benchmarks/README.md)"),
        },
        bus=Rate(2e9, "B/s", "assumed; gloo over loopback"),
        decode_floor=Rate(0.002, "s", "assumed; transformers' own work for a step of a tiny model"),
        decode_draw=Rate(0.0, "s", "assumed; part of the share of products below"),
        decode_memory=Rate(10e9, "B/s", "assumed"),
        decode_share=Rate(0.16, "", "assumed; 55 tokens/s of SmolLM2-135M's shape on a core (benchmarks/README.md)"),
        shared=True,
    )


def gemm_rate(dtype: torch.dtype, size: int, repeats: int) -> float:
    """FLOP/s of the best of several products of two (size, size) matrices on this CPU."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
