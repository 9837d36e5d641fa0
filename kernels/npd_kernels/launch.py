"""How Triton kernels are launched: one policy for every device."""

import importlib.util
import os

import torch

# Read once, as triton itself does when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# triton-ascend takes at most this many programs (UINT16_MAX); kernels stride over what is left.
MAX_PROGRAMS = 65535


def triton_unavailable(device: torch.device) -> str | None:
    """Why a Triton kernel cannot run on `device`; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    if device.type == "cpu" and not INTERPRETED:
        return "Triton generates no code for CPUs (TRITON_INTERPRET=1 is for tests)"
    return None


def grid_size(items: int) -> tuple[int]:
    """One program per item as far as the device takes them. A kernel must loop: item = pid, pid + programs, ..."""
    return (min(items, MAX_PROGRAMS),)
