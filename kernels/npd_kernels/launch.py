"""Where kernels run, and how the Triton ones are launched: a table per device, and nothing tried out at run time.

Each entry is compiled for its device by the tests, which fail when it overflows the on-chip memory: tests/ascend for
Ascend910B1 and 910B3 (192 KB of unified buffer), tests/cuda for sm_80 and sm_90 (shared memory and spilled registers).
"""

import importlib.util
import os
from dataclasses import dataclass

import torch

# Read once, as triton itself does when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# triton-ascend takes at most this many programs (UINT16_MAX); kernels stride over what is left.
MAX_PROGRAMS = 65535


@dataclass(frozen=True, slots=True)
class Tile:
    """rows, cols: query and key rows of an attention block, or (1, columns held at once) of a row-wise kernel."""

    rows: int
    cols: int
    warps: int | None = None  # CUDA only, as are stages
    stages: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Of the compiler."""
        return {"num_warps": self.warps, "num_stages": self.stages} if self.warps else {}


# device -> (largest head size, widest element in bytes) -> tiles of forward, backward_q and backward_kv
ATTENTION_TILES: dict[str, dict[tuple[int, int], tuple[Tile, Tile, Tile]]] = {
    "cpu": {(256, 4): (Tile(16, 16), Tile(16, 16), Tile(16, 16))},
    "npu": {
        (128, 2): (Tile(128, 64), Tile(128, 64), Tile(128, 64)),
        (128, 4): (Tile(64, 32), Tile(64, 32), Tile(64, 32)),
        (256, 2): (Tile(64, 32), Tile(64, 32), Tile(64, 32)),
        (256, 4): (Tile(32, 16), Tile(32, 16), Tile(32, 16)),
    },
    "cuda": {
        (64, 2): (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
        (128, 2): (Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
        (256, 2): (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
        # no tensor cores in full float32
        (64, 4): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
        (128, 4): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(16, 16, 8, 2)),
        (256, 4): (Tile(32, 16, 8, 2), Tile(32, 16, 8, 2), Tile(16, 16, 8, 1)),
    },
}
# device -> tiles of the row-wise kernels
ROW_TILES: dict[str, dict[str, Tile]] = {
    "cpu": {"token_loss": Tile(1, 128), "logsumexp": Tile(1, 128), "divergence": Tile(1, 128)},
    "npu": {"token_loss": Tile(1, 4096), "logsumexp": Tile(1, 4096), "divergence": Tile(1, 2048)},
    "cuda": {"token_loss": Tile(1, 4096, 8, 2), "logsumexp": Tile(1, 4096, 8, 2), "divergence": Tile(1, 4096, 8, 2)},
}


def triton_unavailable(device: torch.device) -> str | None:
    """Why a Triton kernel cannot run on `device`; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    if device.type == "cpu" and not INTERPRETED:
        return "Triton generates no code for CPUs (TRITON_INTERPRET=1 is for tests)"
    if device.type not in ROW_TILES:
        return f"no launch table for {device.type} devices"
    if device.type == "npu" and importlib.util.find_spec("triton.backends.ascend") is None:
        return "this triton generates no code for NPUs; install triton-ascend last (docs/ascend.md)"
    return None


def npu_unavailable(device: torch.device) -> str | None:
    """Why an operator of torch_npu cannot run on `device`; None if it can."""
    if device.type != "npu":
        return f"it needs an Ascend NPU, and the tensors are on {device.type}"
    if importlib.util.find_spec("torch_npu") is None:
        return "the torch_npu package is not installed"
    return None


def attention_tile(kernel: str, device: str, head_size: int, element_size: int) -> Tile:
    """The block of `kernel` (forward, backward_q, backward_kv) on a type of device. RuntimeError beyond the table."""
    fitting = [key for key in ATTENTION_TILES[device] if head_size <= key[0] and element_size <= key[1]]
    if not fitting:
        raise RuntimeError(f"packed_attention has no block for head size {head_size}; the largest is 256")
    return ATTENTION_TILES[device][min(fitting)][("forward", "backward_q", "backward_kv").index(kernel)]


def grid(items: int, device: torch.device, *, matrix: bool) -> tuple[int]:
    """Programs for `items` pieces of work. A kernel must loop: item = pid, pid + programs, ...

    matrix: whether the kernel multiplies matrices, and so runs on the cube cores of an NPU and not on its vector cores.
    An NPU starts programs in waves, so it gets one per core; a GPU gives the next program to whoever is free.
    """
    if device.type != "npu":
        return (min(items, MAX_PROGRAMS),)
    from triton.runtime import driver

    cores = driver.active.utils.get_device_properties(device.index)["num_aicore" if matrix else "num_vectorcore"]
    return (min(items, cores),)
