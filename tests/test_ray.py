"""A run over the nodes of a real Ray cluster, one of which dies. The nodes are processes on this machine."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from listening import LOOPBACK, listening
from test_live import ONE_BEHIND, ROOT, settings, soak, wait_for, whole_run  # noqa: F401

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent


class Node:
    """`ray start` in a process group of its own; its processes die with it. cards: that it sees, where that is said."""

    def __init__(self, folder: Path, *options: str, cards: str | None = None):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        environment |= dict.fromkeys(("ASCEND_RT_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"), cards) if cards else {}
        words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=2", *options]
        self._log = folder / f"ray{len(list(folder.glob('ray*.log')))}.log"
        with self._log.open("w") as output:
            self.process = subprocess.Popen(
                words, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    def up(self) -> bool:
        assert self.process.poll() is None, self._log.read_text()
        return "Ray runtime started" in self._log.read_text()

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def cluster(tmp_path):
    """(address, a function that adds a node)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = []

    def add(*options: str, cards: str | None = None) -> Node:
        nodes.append(Node(tmp_path, "--node-ip-address=127.0.0.1", *options, cards=cards))
        wait_for(nodes[-1].up)
        return nodes[-1]

    add("--head", f"--port={address.split(':')[1]}", "--include-dashboard=false", '--resources={"room": 1}')
    yield address, lambda *options, cards=None: add(f"--address={address}", *options, cards=cards)
    for node in reversed(nodes):
        node.kill()


def test_a_node_that_dies_loses_nothing(cluster, soak, tmp_path):  # noqa: F811
    address, add = cluster
    second = add('--resources={"room": 1, "teacher": 1}')
    needs = "rollout_needs: {room: 1}, teacher_needs: {teacher: 1}"
    processes = f"processes={{rollout: 2, {needs}, ray: '{address}'}}"
    more = settings(tmp_path / "run", ONE_BEHIND, processes, "data.prompts.count=600")
    words = [sys.executable, "-m", "npd_ascend", "run", *more]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        packs = tmp_path / "run" / "stream" / "packs.jsonl"
        wait_for(lambda: packs.exists() and packs.read_text().count("\n") > 3, 240)
        second.kill()
        log = tmp_path / "run" / "logs" / "run.log"
        wait_for(lambda: "Ray lost it" in log.read_text())
        lacks = f"rollout-0, rollout-1 take 2 room side by side, but the Ray cluster at {address} has 1 room in all"
        wait_for(lambda: lacks in log.read_text())
        add('--resources={"room": 1, "teacher": 1}')  # it takes the place of the other, while the run runs
        _, said = process.communicate(timeout=400)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, said
    for lost in (r"rollout-\d", "score"):
        assert re.search(rf"npd {lost} crashed with exit code 1; restart 1 of 5", log.read_text())
    assert soak.check(tmp_path / "run") == []


ASK_FOR_CARDS = """
import sys
import time
from pathlib import Path
from npd_ascend.config import load_config
from npd_ascend.ray_nodes import RayProcess, join_cluster

config = load_config(Path(sys.argv[1]), sys.argv[4:])
join_cluster(config)
logs = [Path(sys.argv[2]) / name for name in "ab"]
# none ends, and gives its card back, before both have one
until_both = " && ".join(f"[ -s {log} ]" for log in logs)
command = ["sh", "-c", f"echo ${sys.argv[3]}; until {until_both}; do sleep 0.1; done"]
both = [RayProcess(command, log, config.ray_needs("rollout")) for log in logs]
while None in (codes := [process.poll() for process in both]):
    time.sleep(0.1)
print(codes, sorted(log.read_text().strip() for log in logs))
"""


def test_workers_get_cards_that_the_trainer_leaves(cluster, tmp_path):
    """By Ray, on a node started as with NPD_RAY_CARDS=6,7. There are no cards behind the numbers."""
    address, add = cluster
    add('--resources={"NPU": 2}', "--num-gpus=2", cards="6,7")
    for kind, variable in (("npu", "ASCEND_RT_VISIBLE_DEVICES"), ("cuda", "CUDA_VISIBLE_DEVICES")):
        (folder := tmp_path / kind).mkdir()
        config = [str(ROOT / "configs" / "addition_cpu.yaml"), str(folder), variable, f"device.kind={kind}"]
        config += ["processes.rollout=2", f"processes.ray={address}", "processes.teacher_needs={CPU: 1}"]
        command = [sys.executable, "-c", ASK_FOR_CARDS, *config]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.stdout.strip() == "[0, 0] ['6', '7']", done.stderr


def marked(mark: str) -> set[int]:
    """Processes that have it in their environment."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it may be gone
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.add(int(process.name))
    return found


def said_of(pid: int, what: str) -> str:
    """what: its file in /proc, such as comm or cmdline."""
    with suppress(OSError):  # it may be gone
        return Path(f"/proc/{pid}/{what}").read_text().strip()
    return ""


RUNS = "touch up; until [ -e down ]; do sleep 0.2; done"


@pytest.mark.parametrize("wide", [False, True])
def test_the_script_opens_no_port_beyond_loopback(tmp_path, wide):
    """launch/npd_ray.sh with this environment in the place of its own, and in npd's something that only waits; and who
    joins does not outstay its Ray.

    wide: as Ray would do it; the test would see that."""
    from ray.util import get_node_ip_address  # not everybody who runs other tests has it

    if wide and get_node_ip_address().startswith("127."):
        pytest.skip("this host has no address but loopback, so Ray cannot open anything wider")
    script = (ROOT / "launch" / "npd_ray.sh").read_text()
    assert "export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0" in script
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "npd_ray.sh").write_text(script.replace("CLUSTER=0", "CLUSTER=1") if wide else script)
    (tmp_path / "launch" / "env.sh").write_text("environment() { :; }\n")
    (tmp_path / ".venv-ray" / "bin").mkdir(parents=True)
    for name, does in (("ray", f'exec {sys.executable} -m ray.scripts.scripts "$@"'), ("npd", RUNS)):
        (tmp_path / ".venv-ray" / "bin" / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / ".venv-ray" / "bin" / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mark = f"NPD_TEST_MARK={tmp_path}"
    environment = os.environ | dict([mark.split("=", 1)]) | {"NPD_RAY_PORT": str(port), "NPD_RAY_NODE": "--num-cpus=2"}
    environment["NPD_DEVICE"] = "cpu"
    environment.pop("NPD_RAY_HOST", None)
    script, joins = ["bash", "launch/npd_ray.sh"], f"{mark}/joins"
    process = subprocess.Popen([*script, "head"], cwd=tmp_path, env=environment)
    try:
        wait_for(lambda: (tmp_path / "up").exists() or process.poll() is not None, 120)
        assert process.poll() is None
        environment |= dict([joins.split("=", 1)])
        join = [*script, "join", f"127.0.0.1:{port}"]
        done = subprocess.run(join, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "NPD_RAY_HOST: the address of this node" in done.stderr
        opened = listening(marked(mark))
        if wide:  # else Ray takes no other node
            environment |= {"NPD_RAY_HOST": "127.0.0.1", "TMPDIR": str(tmp_path)}
            said = tmp_path / "said"
            for lost in (True, False):
                with said.open("w") as output:
                    joined = subprocess.Popen(join, cwd=tmp_path, env=environment, stdout=output, stderr=output)
                wait_for(lambda: "this node has" in said.read_text(), 120)
                if lost:
                    (raylet,) = [pid for pid in marked(joins) if said_of(pid, "comm") == "raylet"]
                    os.kill(raylet, signal.SIGTERM)
                else:
                    # so that Ray's end takes as long as on a busy host
                    (monitor,) = [
                        pid for pid in marked(mark) - marked(joins) if "log_monitor" in said_of(pid, "cmdline")
                    ]
                    os.kill(monitor, signal.SIGSTOP)
                    (tmp_path / "down").touch()
                assert joined.wait(120) == lost, said.read_text()
                assert ("has lost the run" if lost else "has ended") in said.read_text()
    finally:
        (tmp_path / "down").touch()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        for pid in marked(mark) | marked(joins):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert opened
    assert (opened <= LOOPBACK) != wide


def test_a_cluster_without_room_and_one_that_is_not_there_are_refused(cluster, tmp_path):
    done = whole_run(
        tmp_path / "run", ONE_BEHIND, f"processes={{rollout: 2, rollout_needs: {{room: 1}}, ray: '{cluster[0]}'}}"
    )
    assert done.returncode == 2
    said = done.stderr.splitlines()[-1]
    assert "rollout-0, rollout-1 take 2 room side by side, but the Ray cluster at" in said
    started = time.monotonic()
    done = whole_run(tmp_path / "run", ONE_BEHIND, "processes={ray: '127.0.0.1:1'}")
    assert done.returncode == 2
    assert "no Ray cluster answers there" in done.stderr.splitlines()[-1]
    assert time.monotonic() - started < 120
