"""Products and attention of the device against float64 on the CPU."""

import time
from collections.abc import Sequence

import torch

from npd_ascend.doctor.finding import Finding
from npd_kernels.packed_attention import packed_attention

SIZE = 1024
CU_SEQLENS = (0, 300, 301, 512)
# of the rounding of the dtype; plain torch on a CPU has up to 4 and 0.5 of it, a wrong mask or layout thousands
_ALLOWED = {torch.float32: 16, torch.bfloat16: 2}


def product_finding(device: torch.device, dtype: torch.dtype) -> Finding:
    a, b = (_random(SIZE, SIZE, seed=seed).to(dtype) for seed in (0, 1))
    truth = a.double() @ b.double()
    there, other = a.to(device), b.to(device)
    there @ other
    started = time.perf_counter()
    product = (there @ other).cpu()  # to the host, so that it is done
    rate = 2 * SIZE**3 / (time.perf_counter() - started)
    return _judged(
        f"product, {_name(dtype)}", product, truth, dtype, f"{rate / 1e9:,.0f} GFLOP/s, the way back included"
    )


def attention_finding(device: torch.device, dtype: torch.dtype, impl: str) -> Finding:
    """`impl` of npd_kernels.packed_attention, three samples of unequal length, two query heads per key head."""
    q, k, v = (_random(CU_SEQLENS[-1], heads, 64, seed=heads).to(dtype) for heads in (4, 2, 2))
    truth = packed_attention(q.double(), k.double(), v.double(), CU_SEQLENS, 0.125, impl="reference")
    check = f"attention {impl}, {_name(dtype)}"
    try:
        out = packed_attention(q.to(device), k.to(device), v.to(device), CU_SEQLENS, 0.125, impl=impl).cpu()
    except RuntimeError as error:
        return Finding(check, "failed", f"{' '.join(str(error).split())[:200]}; set kernels.attention to another one")
    return _judged(check, out, truth, dtype, f"{len(CU_SEQLENS) - 1} samples in a pack")


def _judged(check: str, value: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype, what: str) -> Finding:
    error = float((value.double() - truth).abs().max() / truth.abs().max())
    allowed = _ALLOWED[dtype] * torch.finfo(dtype).eps
    said = f"largest error {error:.1e} of the largest value ({allowed:.0e} allowed), {what}"
    if not error <= allowed:  # nan too
        return Finding(check, "failed", f"{said}; compare driver and packages with the row of versions")
    return Finding(check, "ok", said)


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compute_findings(device: torch.device, impls: Sequence[str]) -> list[Finding]:
    dtypes = (torch.float32, torch.bfloat16)
    return [product_finding(device, dtype) for dtype in dtypes] + [
        attention_finding(device, dtype, impl) for impl in dict.fromkeys(impls) for dtype in dtypes
    ]
