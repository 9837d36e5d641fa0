"""Which processes a run has, which of them run side by side, and which cards each of them gets.

Processes of one group run side by side and share no card; the next group begins with the first card again. So with
npd.stream, npd.overlap or grpo trainer, rollouts and teacher split the cards; in the plain cycle they take turns.

Over several nodes every node walks the same groups and has the same share of each: its ranks of the trainer, and every
NNODES-th worker. What is only there once runs on node 0.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from npd_ascend.config import Config
from npd_ascend.errors import UserError
from npd_ascend.parallel.launch import ranks_of
from npd_ascend.ranks import (
    Node,
    card_environment,
    node_rank_environment,
    rank_environment,
    this_node,
    visible_cards,
)
from npd_ascend.runfolder import worker_name

TRAINERS = ("sft", "distill", "grpo")  # processes that have the trainer's ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process of a run: `npd ARGUMENTS`."""

    name: str  # of its log, lock and heartbeat
    arguments: tuple[str, ...]
    # it gives signs of life, and is started again when it crashed as well as when it was killed
    watched: bool = False
    needs: Mapping[str, float] | None = None  # a worker, and what it takes of a Ray cluster
    cards: int = 1  # accelerators, where there are some

    def command(self, config: Config) -> list[str]:
        role, *more = self.arguments
        return [sys.executable, "-m", "npd_ascend", role, "--run", str(config.run.folder), *more]


def recipe(config: Config) -> list[list[Process]]:
    """Groups of processes; the first of a group has the terminal."""
    ranks = config.parallel.tp * config.parallel.dp
    groups = [[Process(name="sft", arguments=("sft",), cards=ranks)]] if config.sft else []
    live = bool(config.npd and config.npd.stream)
    distill = Process(name="distill", arguments=("distill",), cards=ranks, watched=live)
    if live:
        groups += [[distill, *_workers(config, "rollout"), *_workers(config, "score")]]
    elif config.npd:
        sets = [
            [_workers(config, role, ("--set", str(phase.number))) for role in ("rollout", "score")]
            for phase in config.npd.phases
        ]
        if config.npd.overlap:
            groups += sets[0]
            groups += [[distill, *rollouts, *scores] for rollouts, scores in sets[1:]] + [[distill]]
        else:
            groups += [group for rollouts, scores in sets for group in (rollouts, scores, [distill])]
    if config.grpo:
        # the rewards are computed on the host, beside the trainer
        reward = Process(name="grpo-reward", arguments=("grpo-reward",), watched=True, cards=0)
        train = Process(name="grpo", arguments=("grpo",), cards=ranks, watched=True)
        groups += [[train, *_workers(config, "grpo-rollout"), reward]]
    groups.append([Process(name="eval", arguments=("eval",))])
    return [*groups, [Process(name="report", arguments=("report",), cards=0)]]


def _workers(config: Config, role: str, arguments: tuple[str, ...] = ()) -> list[Process]:
    processes = config.processes
    if role.endswith("rollout"):
        count, needs = processes.rollout, config.ray_needs("rollout")
    else:
        count, needs = processes.teacher, config.ray_needs("teacher")
    if count == 1:
        return [Process(name=role, arguments=(role, *arguments), watched=True, needs=needs)]
    return [
        Process(
            name=worker_name(role, number),
            arguments=(role, *arguments, "--worker", str(number)),
            watched=True,
            needs=needs,
        )
        for number in range(count)
    ]


def share(config: Config, group: Sequence[Process], node: Node) -> list[Process]:
    """What of a group runs on `node`. UserError if the nodes cannot share the trainer's ranks."""
    ranks = len(ranks_of(node, config.parallel.tp * config.parallel.dp))
    if node.count > 1 and ranks % config.parallel.tp:
        raise UserError(
            f"parallel.tp={config.parallel.tp} with {ranks} ranks on each of NNODES={node.count} would cut layers "
            f"across the network; lower parallel.tp or raise parallel.dp"
        )
    mine: list[Process] = []
    for process in group:
        if process.name in TRAINERS:
            mine.append(replace(process, cards=ranks))
        elif _number(process) % node.count == node.rank:
            mine.append(process)
    return mine


def _number(process: Process) -> int:
    """Of a worker among its like; 0 for what is there once."""
    words = process.arguments
    return int(words[words.index("--worker") + 1]) if "--worker" in words else 0


def place(config: Config, group: Sequence[Process], cards: Sequence[str]) -> dict[str, dict[str, str]]:
    """Process name -> what its environment says of its cards. UserError if there are too few.

    cards: those of this host; on a CPU there are none to share. A worker that Ray places gets its cards from Ray.
    """
    if config.device.kind == "cpu":
        return {process.name: {} for process in group}
    mine = [process for process in group if not (config.processes.ray and process.needs)]
    wanted = sum(process.cards for process in mine)
    if wanted > len(cards):
        parts = ", ".join(f"{process.name} {process.cards}" for process in mine)
        here = f"{len(cards)} are here ({', '.join(cards)})" if cards else "no driver's file of one is in /dev"
        (variable,) = card_environment(config.device.kind, [])
        raise UserError(
            f"{wanted} cards are wanted side by side ({parts}) and {here}; lower parallel.tp x parallel.dp, "
            f"processes.rollout or processes.teacher, or name those to use in {variable}"
        )
    left = list(cards)
    placed: dict[str, dict[str, str]] = {process.name: {} for process in group}
    for process in (process for process in mine if process.cards):
        placed[process.name] = card_environment(config.device.kind, left[: process.cards])
        del left[: process.cards]
    return placed


def check_cards(config: Config) -> None:
    """UserError if any group wants more cards than this host has, or what several nodes cannot do."""
    node = this_node()
    if node.count > 1 and config.processes.ray:
        raise UserError(
            f"processes.ray={config.processes.ray} and NNODES={node.count}: both spread workers; leave one out"
        )
    if node.count > 1 and config.rollout and config.rollout.weights != "disk":
        raise UserError(
            f"rollout.weights={config.rollout.weights} is for one host and NNODES={node.count}; set it to disk"
        )
    for group in recipe(config):
        place(config, share(config, group, node), visible_cards(config.device.kind))


def listing(config: Config) -> str:
    """Every process of every node with its environment and command line, for people. Needs no device and no model."""
    here = this_node()
    if here.count == 1:
        return "\n".join(_listing(config, here))
    lines = []
    for rank in range(here.count):
        node = replace(here, rank=rank)
        lines.append(
            f"node {rank}: NNODES={node.count} NODE_RANK={rank} MASTER_ADDR={node.address} MASTER_PORT={node.port}"
        )
        lines += [f"  {line}" for line in _listing(config, node)]
    return "\n".join(lines)


def _listing(config: Config, node: Node) -> list[str]:
    lines = []
    world_size = config.parallel.tp * config.parallel.dp
    for number, whole in enumerate(recipe(config), 1):
        group = share(config, whole, node)
        # a machine without cards shows what one with enough of them would do
        most = sum(process.cards for process in group)
        cards = visible_cards(config.device.kind) or [str(card) for card in range(most)]
        placed = place(config, group, cards)
        lines.append(f"{number}." + (" side by side" if len(group) > 1 else "" if group else " nothing here"))
        for process in group:
            words = [f"{key}={value}" for key, value in placed[process.name].items()]
            words += ["npd", *process.command(config)[3:]]
            where = f"   (on a node with {dict(process.needs)})" if config.processes.ray and process.needs else ""
            lines.append(f"   {process.name:<12}{' '.join(words)}{where}")
            if process.name in TRAINERS and world_size > 1:
                lines += _rank_lines(node, world_size)
    return lines


def _rank_lines(node: Node, world_size: int) -> list[str]:
    """What a trainer starts for each of its ranks; where they meet is known when they are started."""
    lines = []
    for rank in ranks_of(node, world_size):
        if node.count == 1:
            environment = rank_environment(rank, world_size, "file:///tmp/npd-ranks-…/store")
        else:
            environment = node_rank_environment(node, rank, world_size, 1)
        said = " ".join(f"{key}={value}" for key, value in environment.items())
        lines.append(f"      rank {rank:<4} {said}")
    return lines
