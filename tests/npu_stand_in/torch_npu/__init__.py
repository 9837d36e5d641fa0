"""torch_npu's name for a device that computes on the CPU: device.cpp, compiled to NPD_STAND_IN.

Nothing of torch-npu is in it, and it shows no more of an NPU than this: every tensor of a run is on the device where it
has to be, what ranks send each other too, and every process uses the card that it was given.
"""

import contextlib
import importlib.util
import os
import types
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed

from .hccl import Hccl
from .operators import _npu_matmul_add_fp32, npu_fusion_attention, npu_rms_norm, npu_rotary_mul, npu_swiglu

__all__ = ["_npu_matmul_add_fp32", "npu", "npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul", "npu_swiglu"]

_spec = importlib.util.spec_from_file_location("device", os.environ["NPD_STAND_IN"])
_device = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_device)


def _set_device(device: int | torch.device) -> None:
    _device.set_device(device if isinstance(device, int) else device.index or 0)


def _of_this_process(field: str) -> int:
    """Bytes; the memory of every card is that of the host."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


npu = types.ModuleType("torch.npu")
npu.device_count = lambda: _device.cards
npu.is_available = npu.is_initialized = lambda: True
npu.current_device = _device.current_device
npu.set_device = _set_device
npu.get_device_name = lambda device=None: "a CPU that stands in for an NPU"
npu.memory_allocated = lambda device=None: _of_this_process("VmRSS")
npu.max_memory_allocated = lambda device=None: _of_this_process("VmHWM")
npu.reset_peak_memory_stats = lambda device=None: Path("/proc/self/clear_refs").write_text("5")


class _Stream:
    """Nothing waits. streams: the cards on which one was asked for."""

    streams: ClassVar[set[int]] = set()

    def synchronize(self) -> None:
        pass


def _current_stream() -> _Stream:
    _Stream.streams.add(_device.current_device())
    return _stream


_stream = _Stream()
npu.current_stream, npu.stream, npu.Stream = _current_stream, contextlib.nullcontext, _Stream
npu.synchronize = lambda device=None: None
npu.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
npu._is_in_bad_fork = lambda: False
npu.manual_seed = npu.manual_seed_all = lambda seed: None

torch.utils.rename_privateuse1_backend("npu")
_device.register_hooks()
torch._register_device_module("npu", npu)
torch.utils.generate_methods_for_privateuse1_backend()
torch.distributed.Backend.register_backend(
    "hccl", lambda options, _: Hccl(options, _device.as_host), extended_api=True, devices=["npu"]
)
