"""Where this process stands among ranks and nodes, and which cards it may use, as the environment says.

Without torch: `npd run` starts processes that import it, and would wait for it too.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from npd_ascend.errors import UserError

# of a device.kind: the variable that says which cards a process sees, and what their files in /dev begin with
_VISIBLE = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}
_FILES = {"npu": "davinci", "cuda": "nvidia"}
_DEV = Path("/dev")


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

    Those that the kind's variable lists if it is set. Else there are as many as the driver has files for, numbered
    from 0: in a container that has the files of some cards only, that is how they are counted, whatever the files are
    called (vllm-project/vllm-ascend#16256 for an NPU).
    """
    if kind == "cpu":
        return []
    if (listed := os.environ.get(_VISIBLE[kind])) is not None:
        return [card for card in listed.split(",") if card]
    files = list(_DEV.glob(f"{_FILES[kind]}[0-9]*"))
    return [str(number) for number in range(len(files))]


def card_environment(kind: str, cards: Sequence[str]) -> dict[str, str]:
    """What makes a child of this process see these cards of device.kind `kind` and no others."""
    return {_VISIBLE[kind]: ",".join(cards)}
