"""The only file that names a device or a collective library, beside ranks.py: what a process may see of them."""

import os
from types import ModuleType
from typing import Any

import numpy as np
import torch

from npd_ascend.errors import UserError
from npd_ascend.ranks import card_environment

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NPU = "npu"  # the device.kind that this project is for
_COLLECTIVES = {"cpu": "gloo", "cuda": "nccl", NPU: "hccl"}
_WAY_OUT = {"cuda": "set device.kind=cpu", NPU: "see docs/ascend.md, or set device.kind=cpu"}


def open_device(kind: str, threads: int) -> torch.device:
    """The device of this process: on a host with cards that of this rank of this host.

    threads: CPU threads of torch; 0 keeps torch's own choice. UserError if a card is wanted and its part of torch is
    not there, too few are visible, or it cannot be opened.
    """
    if threads:
        torch.set_num_threads(threads)
    if kind == "cpu":
        return torch.device(kind)
    return _open_card(kind, _torch_npu() if kind == NPU else torch.cuda)


def _open_card(kind: str, module: ModuleType) -> torch.device:
    index, count = int(os.environ.get("LOCAL_RANK", "0")), module.device_count()
    if index >= count:
        visible = ", ".join(f"{name} is {os.environ.get(name, 'not set')}" for name in card_environment(kind, []))
        raise UserError(
            f"device.kind={kind}: this rank wants {kind.upper()} device {index} and torch {torch.__version__} sees "
            f"{count} ({visible}); lower parallel.tp x parallel.dp, or {_WAY_OUT[kind]}"
        )
    try:
        module.set_device(index)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"device.kind={kind}: {kind.upper()} device {index} cannot be opened ({reason}); `npd doctor` says more, "
            f"{_WAY_OUT[kind]}"
        ) from None
    return torch.device(kind, index)


def _torch_npu() -> ModuleType:
    """torch.npu, which torch_npu brings.

    Blocks of memory may grow unless the environment says otherwise (packs differ in length), and HCCL_DETERMINISTIC,
    which asks collectives for the same bits every time, asks torch's operators too. Sources: docs/ascend.md.
    """
    if not os.environ.get("PYTORCH_ALLOC_CONF"):  # torch_npu refuses both
        os.environ.setdefault("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True")
    try:
        import torch_npu
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"device.kind=npu: torch_npu does not load ({reason}); {_WAY_OUT[NPU]}") from None
    if os.environ.get("HCCL_DETERMINISTIC", "false").lower() != "false":
        torch.use_deterministic_algorithms(True)
    return torch_npu.npu


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """`values` on `device`, where the copy waits its turn behind what is queued there, and the host for nothing.

    From page-locked memory: torch_npu waits for the stream with any other (CachingHostAllocator.cpp), and keeps this
    until the copy is over. On a CPU it shares the memory of `values`.
    """
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def collective_backend(device: torch.device) -> str:
    return _COLLECTIVES[device.type]


def device_communicator(device: torch.device) -> Any:
    """vLLM's class of communicators between devices, apart from the groups of torch.distributed.

    Made of (StatelessProcessGroup, device); broadcast(tensor, src, stream). UserError if it cannot be imported.
    Sources: docs/ascend.md.
    """
    try:
        if device.type == NPU:
            from vllm_ascend.distributed.device_communicators.pyhccl import PyHcclCommunicator as Communicator
        else:
            from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator as Communicator
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"rollout.weights=device: vLLM's {collective_backend(device)} communicator cannot be imported ({reason}); "
            f"install vLLM for this device where the trainer runs, or set rollout.weights: memory"
        ) from None
    return Communicator


def group_bytes(kind: str) -> int:
    """What a group of ranks takes of each card for its buffers: HCCL twice HCCL_BUFFSIZE (MB), gloo nothing."""
    return 2 * int(os.environ.get("HCCL_BUFFSIZE", "200")) * 10**6 if kind == NPU else 0
