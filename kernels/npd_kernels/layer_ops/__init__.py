"""The small operators between a layer's matrix products: RMS norm, rotary embedding, gated activation.

Dimensions: T tokens, N heads, H head size, I intermediate size; `...` any leading ones.
"""

from types import ModuleType

import torch

from . import impl_npu, impl_torch

IMPLEMENTATIONS: dict[str, ModuleType] = {"torch": impl_torch, "npu": impl_npu}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float | None, *, impl: str) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype; eps None: that of the dtype."""
    return _choose(impl, x).rms_norm(x, weight, torch.finfo(x.dtype).eps if eps is None else eps)


def rotary_tables(angle_TH: torch.Tensor, dtype: torch.dtype, *, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What `rotate` of the same impl takes, from each token's float32 angles, the half of them twice."""
    return _choose(impl, angle_TH).rotary_tables(angle_TH, dtype)


def rotate(x_TNH: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], *, impl: str) -> torch.Tensor:
    """Rotary embedding in the half-split form of Llama: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    return _choose(impl, x_TNH).rotate(x_TNH, *tables)


def swiglu(gate_up: torch.Tensor, *, impl: str) -> torch.Tensor:
    """[..., 2 I] -> [..., I]: silu of the first half times the second."""
    return _choose(impl, gate_up).swiglu(gate_up)


def _choose(impl: str, x: torch.Tensor) -> ModuleType:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"layer_ops impl {impl!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    if reason := IMPLEMENTATIONS[impl].unavailable_reason(x.device):
        raise RuntimeError(f"layer_ops impl {impl!r} cannot run here: {reason}")
    return IMPLEMENTATIONS[impl]
