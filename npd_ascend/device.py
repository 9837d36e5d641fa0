"""The only file that names a device or a collective library, and that reads where this process stands among others."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"
_COLLECTIVES = {"cpu": "gloo"}


@dataclass(frozen=True, slots=True)
class Rank:
    """This process among those of one trainer, as torchrun or parallel/launch.py put it in the environment."""

    rank: int
    world_size: int
    rendezvous: str  # init_method of torch.distributed


def open_device(kind: str, threads: int) -> torch.device:
    """The device of this process. `threads`: CPU threads of torch; 0 keeps torch's own choice."""
    if threads:
        torch.set_num_threads(threads)
    return torch.device(kind)


def collective_backend(device: torch.device) -> str:
    return _COLLECTIVES[device.type]


def this_rank() -> Rank:
    return Rank(
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        rendezvous=os.environ.get("NPD_RENDEZVOUS", "env://"),
    )


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
