"""Plain torch."""

import torch
from torch.nn import functional as F


def unavailable_reason(device: torch.device) -> str | None:
    """Runs on every device torch has; None means available."""
    return None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rotary_tables(angle_TH: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The sign of rotate-half is folded into the sine, so that rotate() needs one roll and no negation."""
    sign_H = torch.ones(angle_TH.shape[1], device=angle_TH.device)
    sign_H[: angle_TH.shape[1] // 2] = -1
    return angle_TH.cos().to(dtype)[:, None], (angle_TH.sin() * sign_H).to(dtype)[:, None]


def rotate(x_TNH: torch.Tensor, cos_T1H: torch.Tensor, signed_sin_T1H: torch.Tensor) -> torch.Tensor:
    return x_TNH * cos_T1H + x_TNH.roll(x_TNH.shape[-1] // 2, dims=-1) * signed_sin_T1H


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
