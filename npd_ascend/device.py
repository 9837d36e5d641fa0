"""The only file that names a device or a collective library, and that reads where this process stands among others."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from npd_ascend.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"
_COLLECTIVES = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
_NPU_WAY_OUT = "see docs/ascend.md, or set device.kind=cpu"


@dataclass(frozen=True, slots=True)
class Rank:
    """This process among those of one trainer, as torchrun or parallel/launch.py put it in the environment."""

    rank: int
    world_size: int
    # init_method of torch.distributed, or store://HOST:PORT/MEETING: a name in the TCPStore that node 0 keeps
    rendezvous: str


@dataclass(frozen=True, slots=True)
class Node:
    """This host among those of a run over several."""

    rank: int = 0
    count: int = 1
    address: str = ""  # of node 0, where all meet; empty for one node
    port: int = 0


def open_device(kind: str, threads: int) -> torch.device:
    """The device of this process. `threads`: CPU threads of torch; 0 keeps torch's own choice."""
    if threads:
        torch.set_num_threads(threads)
    return _open_npu() if kind == "npu" else torch.device(kind)


def _open_npu() -> torch.device:
    """The NPU of this rank of this host. UserError if torch_npu does not load or sees too few.

    Blocks of memory may grow unless the environment says otherwise (packs differ in length), and HCCL_DETERMINISTIC,
    which asks collectives for the same bits every time, asks torch's operators too. Sources: docs/ascend.md.
    """
    if not os.environ.get("PYTORCH_ALLOC_CONF"):  # torch_npu refuses both
        os.environ.setdefault("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True")
    try:
        import torch_npu
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"device.kind=npu: torch_npu does not load ({reason}); {_NPU_WAY_OUT}") from None
    npu = torch_npu.npu
    index, count = int(os.environ.get("LOCAL_RANK", "0")), npu.device_count()
    if index >= count:
        visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "not set")
        raise UserError(
            f"device.kind=npu: this rank wants NPU {index} and {count} are visible (ASCEND_RT_VISIBLE_DEVICES is "
            f"{visible}); lower parallel.tp x parallel.dp, or {_NPU_WAY_OUT}"
        )
    npu.set_device(index)
    if os.environ.get("HCCL_DETERMINISTIC", "false").lower() != "false":
        torch.use_deterministic_algorithms(True)
    return torch.device("npu", index)


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """`values` on `device`, where the copy waits its turn behind what is queued there, and the host for nothing.

    From page-locked memory: torch_npu waits for the stream with any other (CachingHostAllocator.cpp), and keeps this
    until the copy is over. On a CPU it shares the memory of `values`.
    """
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def accelerator() -> str:
    """The device.kind that is no CPU."""
    return "npu"


def collective_backend(device: torch.device) -> str:
    return _COLLECTIVES[device.type]


def device_communicator(device: torch.device) -> Any:
    """vLLM's class of communicators between devices, apart from the groups of torch.distributed.

    Made of (StatelessProcessGroup, device); broadcast(tensor, src, stream). UserError if it cannot be imported.
    Sources: docs/ascend.md.
    """
    try:
        if device.type == "npu":
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
    return 2 * int(os.environ.get("HCCL_BUFFSIZE", "200")) * 10**6 if kind == "npu" else 0


def this_rank() -> Rank:
    return Rank(
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        rendezvous=os.environ.get("NPD_RENDEZVOUS", "env://"),
    )


def this_node() -> Node:
    """NODE_RANK of NNODES, which meet at MASTER_ADDR:MASTER_PORT; UserError if they contradict each other."""
    counted, numbered = os.environ.get("NNODES", "1"), os.environ.get("NODE_RANK", "0")
    port = os.environ.get("MASTER_PORT", "29500")
    for name, value in (("NNODES", counted), ("NODE_RANK", numbered)):
        if not value.isdecimal():
            raise UserError(f"{name}={value}: want a number; see launch/npd_cluster.sh")
    count, rank = int(counted), int(numbered)
    if rank >= count:
        raise UserError(f"NODE_RANK={rank} of NNODES={count}: nodes are counted from 0; set one of them right")
    if count == 1:
        return Node()
    # a single node may have it for another purpose: Kubernetes sets it for a service of that name
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"MASTER_PORT={port}: want a number from 1 to 65535; see launch/npd_cluster.sh")
    if not (address := os.environ.get("MASTER_ADDR")):
        raise UserError(f"NNODES={count} and no MASTER_ADDR; set it to the address of node 0 on every node")
    return Node(rank, count, address, int(port))


def rank_environment(rank: int, world_size: int, rendezvous: str) -> dict[str, str]:
    """What `this_rank` reads in a child of this process, all ranks on this host."""
    # gloo would otherwise listen on whatever address the host name resolves to
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "NPD_RENDEZVOUS": rendezvous,
        "GLOO_SOCKET_IFNAME": "lo",
    }


def node_rank_environment(node: Node, rank: int, world_size: int, meeting: int) -> dict[str, str]:
    """The same for a rank of those on several nodes. meeting: a new one whenever they start."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % (world_size // node.count)),
        "WORLD_SIZE": str(world_size),
        "NPD_RENDEZVOUS": f"store://{node.address}:{node.port}/{meeting}",
    }


def visible_cards(kind: str) -> list[str]:
    """The accelerators of this host that this process may use; none for a CPU.

    ASCEND_RT_VISIBLE_DEVICES if it is set, else the driver's device files.
    """
    if kind == "cpu":
        return []
    if listed := os.environ.get(_VISIBLE):
        return listed.split(",")
    files = [path.name.removeprefix("davinci") for path in Path("/dev").glob("davinci[0-9]*")]
    return sorted(files, key=int)


def card_environment(cards: Sequence[str]) -> dict[str, str]:
    """What makes a child of this process see these cards and no others."""
    return {_VISIBLE: ",".join(cards)}
