"""Processes on the nodes of a Ray cluster, each wherever there is room; to the supervisor they are like its own.

Ray finds the node, sees that it died, and gives a process the cards it asked for (ASCEND_RT_VISIBLE_DEVICES for the
resource NPU). Whether and how often a process is started again is decided where it is for all: by the supervisor.
"""

import logging
import socket
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from npd_ascend.config import Config
from npd_ascend.errors import UserError
from npd_ascend.parallel.launch import die_with_parent
from npd_ascend.placement import recipe

_CRASHED = 1
_KILL_S = 10
_CONNECT_S = 5
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

    def poll(self) -> int | None:
        """The exit code, negative for a signal; 1 if the node or Ray's own process is gone; None while it runs."""
        import ray

        if not ray.wait([self._result], timeout=0)[0]:
            return None
        try:
            return ray.get(self._result)
        except ray.exceptions.RayError as error:
            _log.warning("npd %s: Ray lost it: %s", self._name, str(error).strip().splitlines()[0])
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
    there = ray.cluster_resources()
    for group in recipe(config):
        wanted: Counter[str] = Counter()
        for process in group:
            wanted.update(process.needs or {})
        for resource, amount in wanted.items():
            have = there.get(resource, 0)
            if have < amount:  # the last of them would wait for ever
                names = ", ".join(process.name for process in group if resource in (process.needs or {}))
                raise UserError(
                    f"{names} take {amount:g} {resource} side by side, but the Ray cluster at {processes.ray} has "
                    f"{have:g} {resource} in all; add nodes, or lower processes.rollout, processes.teacher or what "
                    f"each of them needs (processes.rollout_needs, processes.teacher_needs)"
                )


def _run_here(command: list[str], log: str) -> int:
    with open(log, "a") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, preexec_fn=die_with_parent).wait()
