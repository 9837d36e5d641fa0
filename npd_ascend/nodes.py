"""The nodes of one run. They meet at MASTER_ADDR:MASTER_PORT, show each other that they share the run folder, and walk
through the recipe in step; the trainer's ranks meet in the same place (parallel/launch.py).

Every node runs the same command, and node 0 keeps the meeting place as long as the run lasts. A node that ends, or is
not heard of, ends the run on all of them; the same command on every node then goes on from what is committed.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from npd_ascend.config import Config, dump_config
from npd_ascend.errors import UserError
from npd_ascend.ranks import Node, this_node
from npd_ascend.runfolder import dict_differences

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_POLL_S, _BEAT_S, _LOST_S = 0.05, 2, 60
# network file systems may show a new file late
_SHOWN_S = 15
# stamps of several nodes are compared by eye; signs of life are compared by the supervisor, against processes.timeout_s
_SKEW_S = 1.0
_AGAIN = "the same command on every node goes on from here"
_log = logging.getLogger(__name__)


class Nodes:
    """This node and the others; with a single one nothing here does anything."""

    def __init__(self, here: Node, store: "TCPStore | None" = None):
        self.here, self._store, self._hosts = here, store, [socket.gethostname()]
        self._others = [rank for rank in range(here.count) if rank != here.rank]
        self._heard = {rank: ("", time.monotonic()) for rank in self._others}
        self._looked, self._gone = time.monotonic(), threading.Event()
        self._speaks, self._silent = True, False  # this process for its node; the meeting place

    def say(self, key: str, value: str) -> None:
        self._ask(partial(self._store.set, f"{key} of node {self.here.rank}", value))

    def said(self, key: str, rank: int) -> str:
        return self._ask(partial(self._store.get, f"{key} of node {rank}")).decode()

    def all_said(self, key: str, at_most_s: float | None = None) -> list[str]:
        """What every node said. UserError if one has ended, is gone, or did not say it in time."""
        started = time.monotonic()
        while late := [rank for rank in range(self.here.count) if not self._has(key, rank)]:
            self.look()
            if at_most_s is not None and time.monotonic() - started > at_most_s:
                raise UserError(
                    f"waited {at_most_s:.0f} s (parallel.timeout_s) at {self.here.address}:{self.here.port} for node "
                    f"{', '.join(map(str, late))} of NNODES={self.here.count}; start the same command there"
                )
            time.sleep(_POLL_S)
        return [self.said(key, rank) for rank in range(self.here.count)]

    def meet(self, step: str) -> None:
        """Wait until every node has come to this step."""
        if self._store is not None:
            with _first_is_there(self.here):
                self.say(step, "here")
                self.all_said(step)

    def look(self) -> None:
        """UserError if another node has ended or is gone. Often called, looks once a second."""
        if self._store is None or time.monotonic() - self._looked < 1:
            return
        self._looked = time.monotonic()
        with _first_is_there(self.here):
            for rank in self._others:
                if self._has("end", rank) and (reason := self.said("end", rank)):
                    raise UserError(f"{self._name(rank)} stopped: {reason}")
                beat = self.said("beat", rank) if self._has("beat", rank) else ""
                before, since = self._heard[rank]
                if beat != before or not beat:
                    self._heard[rank] = (beat, time.monotonic())
                elif time.monotonic() - since > _LOST_S:
                    raise UserError(f"{self._name(rank)} gave no sign of life for {_LOST_S} s; {_AGAIN}")

    def end(self, reason: str) -> None:
        """Tell the others why this node stops; empty: all is done."""
        if self._store is not None and self._speaks and not self._has("end", self.here.rank):
            self.say("end", reason)

    def join(self, config: Config) -> None:
        """Wait for all. UserError if they do not run the same, or do not share the run folder."""
        timeout_s = config.parallel.timeout_s
        if self._ask(partial(self._store.add, f"joined as node {self.here.rank}", 1)) > 1:
            # a run that is under way does not end because somebody typed its command once more
            self._speaks = not all(self._has("host", rank) for rank in range(self.here.count))
            raise UserError(
                f"NODE_RANK={self.here.rank} was here before: two nodes have this number, or this one stopped and the "
                f"others still run; stop all and start the same command on every node"
            )
        threading.Thread(target=self._beat, daemon=True).start()
        self.say("host", socket.gethostname())
        self._hosts = self.all_said("host", timeout_s)
        self.say("configuration", dump_config(config))
        self._check_same(self.all_said("configuration", timeout_s))
        views = _exchange_tokens(self, config.run.folder / "nodes", timeout_s)
        names = [self._name(rank) for rank in range(self.here.count)]
        judge(config.run.folder, names, views, config.processes.timeout_s)

    def leave(self, reason: str) -> None:
        """Node 0 waits a little for the others, who still look at the meeting place."""
        self._gone.set()
        try:
            self.end(reason)
            deadline = time.monotonic() + 10
            while self.here.rank == 0 and time.monotonic() < deadline:
                if all(self._has("end", rank) for rank in self._others):
                    break
                time.sleep(_POLL_S)
        except RuntimeError as error:
            _log.debug("node 0 is gone already", exc_info=error)

    def _ask(self, operation: Callable[[], Any]) -> Any:
        """What the meeting place says. RuntimeError if it says nothing: a host without power closes no connection."""
        outcome: list[Any] = []

        def ask() -> None:
            try:
                outcome.append((True, operation()))
            except RuntimeError as error:
                outcome.append((False, error))

        if not self._silent:
            asking = threading.Thread(target=ask, daemon=True)
            asking.start()
            asking.join(_LOST_S)
        if not outcome:
            self._silent = True
            raise RuntimeError(f"no answer within {_LOST_S} s")
        answered, value = outcome[0]
        if not answered:
            raise value
        return value

    def _has(self, key: str, rank: int) -> bool:
        return self._ask(partial(self._store.check, [f"{key} of node {rank}"]))

    def _name(self, rank: int) -> str:
        return f"node {rank}" + (f" ({self._hosts[rank]})" if len(self._hosts) > rank else "")

    def _check_same(self, configurations: Sequence[str]) -> None:
        wanted, *others = map(yaml.safe_load, configurations)  # which may be of another version of this project
        for rank, got in enumerate(others, 1):
            for key, was, is_now in dict_differences(wanted, got):
                raise UserError(
                    f"{self._name(rank)} runs another configuration than {self._name(0)}: {key} is {is_now!r} instead "
                    f"of {was!r}; start the same command on both, from the same version of this project"
                )

    def _beat(self) -> None:
        number = 0
        while not self._gone.wait(_BEAT_S if number else 0):
            number += 1
            try:
                self.say("beat", str(number))
            except RuntimeError as error:
                _log.debug("node 0 is gone; who waits for something will say so", exc_info=error)
                return


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a node found in the run folder, and its clock at the moment when all had come."""

    seen: frozenset[int]  # nodes whose token it read
    clock_s: float


def judge(folder: Path, names: Sequence[str], views: Sequence[View], timeout_s: int) -> None:
    """UserError for the first node that has another file system at `folder` than node 0, or another time.

    names, views: by node. timeout_s: after which a process without a sign of life is stopped; signs carry the time.
    """
    for rank, view in enumerate(views):
        if rank not in views[0].seen or 0 not in view.seen:
            raise UserError(
                f"{folder}: what {names[rank]} has there is not the file system of {names[0]}; mount the shared one "
                f"at this path on every node, or set run.folder to a place on it"
            )
        skew = view.clock_s - views[0].clock_s
        if abs(skew) > timeout_s / 2:
            raise UserError(
                f"the clock of {names[rank]} is {skew:+.0f} s off {names[0]}'s, and processes.timeout_s={timeout_s} "
                f"compares their stamps; let chrony or ntpd set both"
            )
        if abs(skew) > _SKEW_S:
            _log.warning(
                "the clock of %s is %+.1f s off %s's; let chrony or ntpd set both", names[rank], skew, names[0]
            )


def _exchange_tokens(nodes: Nodes, folder: Path, timeout_s: int) -> list[View]:
    """Every node leaves a file with the run's token in `folder` and looks for those of the others."""
    token, mine = nodes.said("token", 0), folder / f"node{nodes.here.rank}"
    with _open_to_all(folder):
        folder.mkdir(parents=True, exist_ok=True)
        mine.write_text(token)
        descriptor = os.open(mine, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    nodes.say("written", "here")
    nodes.all_said("written", timeout_s)
    clock_s, started = time.time(), time.monotonic()
    seen: set[int] = set()
    while len(seen) < nodes.here.count and time.monotonic() - started < _SHOWN_S:
        with _open_to_all(folder):
            seen |= {rank for rank in range(nodes.here.count) if _reads(folder / f"node{rank}", token)}
        time.sleep(_POLL_S)
    nodes.say("view", json.dumps([sorted(seen), clock_s]))
    found = [json.loads(text) for text in nodes.all_said("view", timeout_s)]
    return [View(seen=frozenset(ranks), clock_s=clock) for ranks, clock in found]


@contextmanager
def _open_to_all(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror}; set run.folder to a place that every node can read and write"
        ) from None


def _reads(path: Path, token: str) -> bool:
    try:
        return path.read_text() == token
    except FileNotFoundError:
        return False


@contextmanager
def open_nodes(config: Config) -> Iterator[Nodes]:
    """All nodes, once each of them is there and can work with the others; UserError names what is in the way."""
    here = this_node()
    if here.count == 1:
        yield Nodes(here)
        return
    with _first_is_there(here):
        nodes = Nodes(here, _open_store(here, config.parallel.timeout_s))
        if here.rank == 0:
            nodes.say("token", secrets.token_hex(16))
    reason = "interrupted"
    try:
        with _first_is_there(here):
            nodes.join(config)
        yield nodes
        reason = ""
    except UserError as error:
        reason = str(error)
        raise
    finally:
        nodes.leave(reason)


def _open_store(here: Node, timeout_s: int) -> "TCPStore":
    from torch.distributed import TCPStore  # a run on one node waits for no torch

    if here.rank == 0:
        try:
            # the ranks of the trainer come as well, so nobody is counted
            return TCPStore(
                here.address, here.port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
            )
        except RuntimeError as error:
            raise UserError(
                f"MASTER_ADDR={here.address}, MASTER_PORT={here.port}: node 0 cannot listen there "
                f"({str(error).splitlines()[0]}); name an address of this host and a free port, on every node"
            ) from None
    try:
        return TCPStore(here.address, here.port, is_master=False, timeout=timedelta(seconds=timeout_s))
    except RuntimeError:
        raise UserError(
            f"MASTER_ADDR={here.address}, MASTER_PORT={here.port}: node 0 did not answer within {timeout_s} s "
            f"(parallel.timeout_s); start the same command there, or name its address"
        ) from None


@contextmanager
def _first_is_there(here: Node) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        _log.debug("the meeting place failed", exc_info=error)
        raise UserError(f"node 0 at {here.address}:{here.port} is gone; {_AGAIN}") from error
