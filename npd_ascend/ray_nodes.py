"""Processes on the nodes of a Ray cluster, each wherever there is room; to the supervisor they are like its own.

Ray finds the node, sees that it died, and gives a process the cards it asked for (ASCEND_RT_VISIBLE_DEVICES for the
resource NPU). Whether and how often a process is started again is decided where it is for all: by the supervisor.
"""

import logging
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from npd_ascend.config import Config
from npd_ascend.errors import UserError
from npd_ascend.parallel.launch import die_with_parent
from npd_ascend.placement import Process, recipe

_CRASHED = 1
_KILL_S = 10
_CONNECT_S = 5
_LOOK_S = 5
_log = logging.getLogger(__name__)


class RayProcess:
    """`command` on some node; poll, kill and wait as those of subprocess.Popen.

    needs: resources of the cluster. log: appended to, on a file system that all nodes share.
    """

    def __init__(self, command: Sequence[str], log: Path, needs: Mapping[str, float]):
        import ray

        needs = dict(needs)
        cpus, gpus = needs.pop("CPU", 0), needs.pop("GPU", 0)  # Ray refuses these two as resources
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, resources=needs, max_retries=0)(_run_here)
        self._result: Any = remote.remote(list(command), str(log))
        self._name = log.stem
        self._lost = False

    def poll(self) -> int | None:
        """The exit code, negative for a signal; 1 if the node or Ray's own process is gone; None while it runs."""
        import ray

        if not ray.wait([self._result], timeout=0)[0]:
            return None
        try:
            return ray.get(self._result)
        except ray.exceptions.RayError as error:
            if not self._lost:  # to be said once
                _log.warning("npd %s: Ray lost it: %s", self._name, str(error).strip().splitlines()[0])
            self._lost = True
            return _CRASHED

    def kill(self) -> None:
        import ray

        ray.cancel(self._result, force=True)  # Ray's process ends, and ours with it

    def wait(self) -> None:
        import ray

        ray.wait([self._result], timeout=_KILL_S)


def join_cluster(config: Config) -> None:
    """Connect to the Ray cluster at processes.ray; UserError if it is not there or too small for the workers."""
    processes = config.processes
    try:
        import ray
    except ImportError:
        raise UserError(
            "processes.ray: the package ray is not installed; pip install -r requirements-ray.txt on every node"
        ) from None
    host, _, port = processes.ray.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _CONNECT_S).close()  # Ray itself would try for minutes
        ray.init(address=processes.ray, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"processes.ray={processes.ray}: no Ray cluster answers there ({str(error).splitlines()[0]}); start one "
            f"with launch/npd_ray.sh, or leave the key out"
        ) from None
    for group in recipe(config):
        if lack := what_is_lacking(config, group):  # the last of them would wait for ever
            raise UserError(lack)


def what_is_lacking(config: Config, group: Sequence[Process]) -> str | None:
    """What `group` takes side by side of the cluster, as it is now, and it has not in all."""
    import ray

    there, wanted = Counter[str](), Counter[str]()
    for node in ray.nodes():  # ray.cluster_resources() has those of a node that died for a while yet
        if node["Alive"]:
            there.update(node["Resources"])
    for process in group:
        wanted.update(process.needs or {})
    for resource, amount in wanted.items():
        have = there[resource]
        if have < amount:
            names = [process.name for process in group if resource in (process.needs or {})]
            take = f"{', '.join(names)} {'take' if names[1:] else 'takes'} {amount:g} {resource} side by side"
            return (
                f"{take}, but the Ray cluster at {config.processes.ray} has {have:g} {resource} in all; add nodes, or "
                f"lower processes.rollout, processes.teacher or what each of them needs (processes.rollout_needs, "
                f"processes.teacher_needs)"
            )
    return None


class Shortage:
    """Says once that the cluster has become too small, as when a node died: Ray lets who is started again wait."""

    def __init__(self, config: Config):
        self._config, self._looked = config, time.monotonic()
        self._said = False

    def look(self, group: Sequence[Process]) -> None:
        """group: who runs, or waits for its place."""
        if not self._config.processes.ray or time.monotonic() - self._looked < _LOOK_S:
            return
        self._looked = time.monotonic()
        lack = what_is_lacking(self._config, group)
        if lack and not self._said:
            _log.warning("%s; who has no place waits for one", lack)
        self._said = lack is not None


def _run_here(command: list[str], log: str) -> int:
    with open(log, "a") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, preexec_fn=die_with_parent).wait()
