"""A run over several nodes, processes on this machine: the same student, and what ends it before it starts."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from command import npd_here
from conftest import CONFIGS
from safetensors.torch import load_file

from npd_ascend import nodes
from npd_ascend.config import dump_config, load_config
from npd_ascend.errors import LostRankError, UserError
from npd_ascend.nodes import Nodes, View, judge
from npd_ascend.parallel.launch import next_meeting, ranks_of
from npd_ascend.placement import check_cards, listing, place, recipe, share
from npd_ascend.ranks import Node, this_node

ROOT = CONFIGS.parent
ADDITION = CONFIGS / "addition_cpu.yaml"
STREAM = ["npd.refresh_after=[]", "npd.stream={}", "processes={rollout: 3, teacher: 1}", "parallel={tp: 2, dp: 2}"]
SMALL = [
    "data.gold.count=200",
    "data.prompts.count=120",
    "data.heldout.count=40",
    "sft.epochs=2",
    "npd.epochs=1",
    "npd.refresh_after=[]",
    "npd.pack_tokens=512",
    "rollout.batch_size=32",
    "filters.tau=1",
    "filters.drop_below_zero=false",
    "device.threads=1",
    "parallel.timeout_s=60",
    f"student.path={CONFIGS / 'addition' / 'student'}",
    f"teacher.path={CONFIGS / 'addition' / 'teacher'}",
]
TWO = ["parallel.dp=2", "processes={rollout: 2, teacher: 2}"]


@pytest.fixture
def two_nodes(monkeypatch):
    for name, value in (("NNODES", "2"), ("NODE_RANK", "1"), ("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "29400")):
        monkeypatch.setenv(name, value)


class Pair:
    """The same command as node 0 and node 1, each in a folder of its own; they end with the test."""

    def __init__(self, folder: Path, *words: str, other: tuple[str, ...] | None = None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.nodes = []
        for rank, chosen in enumerate((words, words if other is None else other)):
            place = folder / f"node{rank}"
            place.mkdir(exist_ok=True)
            command = [sys.executable, "-m", "npd_ascend", "run", "--config", str(ADDITION), *chosen]
            pipe = subprocess.PIPE
            environment = self._environment(rank)
            self.nodes.append(
                subprocess.Popen(command, env=environment, cwd=place, stdout=pipe, stderr=pipe, text=True)
            )

    def _environment(self, rank: int) -> dict[str, str]:
        path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
        return os.environ | {
            "NNODES": "2",
            "NODE_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": path,
        }

    def wait(self) -> list[tuple[int, str]]:
        """(exit code, last line of what it said) of both."""
        ended = []
        for node in self.nodes:
            _, said = node.communicate(timeout=600)
            ended.append((node.returncode, said.strip().splitlines()[-1] if said.strip() else ""))
        return ended

    def close(self) -> None:
        for node in self.nodes:
            node.kill()
            node.communicate()


@pytest.fixture
def pair(tmp_path):
    started = []

    def start(*words: str, other: tuple[str, ...] | None = None) -> Pair:
        started.append(Pair(tmp_path, *words, other=other))
        return started[-1]

    yield start
    for one in started:
        one.close()


def test_every_process_has_one_node_and_every_rank_too(two_nodes):
    config = load_config(ADDITION, [*STREAM, "device.kind=npu"])
    for group in recipe(config):
        names = [[process.name for process in share(config, group, Node(rank, 2, "a", 1))] for rank in (0, 1)]
        for process in group:
            wanted = 2 if process.name in ("sft", "distill") else 1
            assert sum(process.name in mine for mine in names) == wanted
    live = next(group for group in recipe(config) if len(group) > 1)
    mine, other = (share(config, live, Node(rank, 2, "a", 1)) for rank in (0, 1))
    assert [process.name for process in mine] == ["distill", "rollout-0", "rollout-2", "score"]
    assert [process.name for process in other] == ["distill", "rollout-1"]
    # ranks of other nodes want no card here
    assert place(config, other, ["0", "1", "2"]) == {
        "distill": {"ASCEND_RT_VISIBLE_DEVICES": "0,1"},
        "rollout-1": {"ASCEND_RT_VISIBLE_DEVICES": "2"},
    }
    assert [rank for node in range(2) for rank in ranks_of(Node(node, 2, "a", 1), 4)] == [0, 1, 2, 3]


def test_a_dry_run_shows_every_process_of_every_node(two_nodes):
    config = load_config(CONFIGS / "openpangu_1b_8npu.yaml", ["parallel.dp=16", "processes={rollout: 16, teacher: 16}"])
    text = listing(config)
    for rank in (0, 1):
        assert f"node {rank}: NNODES=2 NODE_RANK={rank} MASTER_ADDR=10.0.0.1 MASTER_PORT=29400" in text
    for group in recipe(config):
        for process in group:
            assert " ".join(process.command(config)[3:]) in text
    first, second = text.split("node 1:")
    for node, part in enumerate((first, second)):
        for rank in range(16):
            said = f"RANK={rank} LOCAL_RANK={rank % 8} WORLD_SIZE=16 NPD_RENDEZVOUS=store://10.0.0.1:29400/"
            assert (said in part) == (rank // 8 == node)
    assert "npd eval" in first
    assert "npd eval" not in second
    assert second.count("ASCEND_RT_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 npd distill") == 2


def run_script(*words: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "NPD_DEVICE"} | {"PYTHON": sys.executable} | variables
    command = ["bash", "launch/npd_cluster.sh", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


def test_the_script_shows_both_nodes_on_a_machine_without_cards():
    config = ["--config", "configs/openpangu_1b_8npu.yaml", "--dry-run", "parallel.dp=16"]
    done = run_script(*config, NNODES="2", NODE_RANK="0", MASTER_ADDR="10.0.0.1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("npd distill") == 4  # two phases, on both nodes
    assert "MASTER_ADDR=10.0.0.1 MASTER_PORT=29500" in done.stdout


@pytest.mark.parametrize("variables", [{}, {"NNODES": "2"}, {"NODE_RANK": "0"}])
def test_the_script_says_what_it_wants(variables):
    done = run_script("--config", "configs/openpangu_1b_8npu.yaml", **variables)
    assert done.returncode == 2
    assert "NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 bash launch/npd_cluster.sh --config FILE" in done.stderr


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"NNODES": "two"}, "NNODES=two: want a number"),
        ({"NODE_RANK": "2"}, "NODE_RANK=2 of NNODES=2: nodes are counted from 0"),
        ({"MASTER_ADDR": ""}, "NNODES=2 and no MASTER_ADDR; set it to the address of node 0"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT=-1: want a number"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999: want a number from 1 to 65535"),
    ],
)
def test_variables_that_contradict_each_other(two_nodes, monkeypatch, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        this_node()


def test_a_single_node_does_not_mind_what_others_keep_in_master_port(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "tcp://10.0.0.1:29500")
    assert this_node() == Node()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallel.dp=3"], "= 3 ranks do not divide over NNODES=2; change one of them"),
        (["parallel.tp=2"], "parallel.tp=2 with 1 ranks on each of NNODES=2 would cut layers across the network"),
        (["parallel.dp=2", "processes.ray=10.0.0.1:1"], "processes.ray=10.0.0.1:1 and NNODES=2: .*leave one out"),
        (
            [*STREAM, "rollout.engine=vllm", "rollout.weights=memory"],
            "rollout.weights=memory is for one host and NNODES=2; set it to disk",
        ),
    ],
)
def test_what_two_nodes_cannot_do_is_said_before_anything_starts(two_nodes, overrides, said):
    with pytest.raises(UserError, match=said):
        check_cards(load_config(ADDITION, overrides))


def test_the_node_without_the_file_system_or_the_time_is_named(caplog):
    names = ["node 0 (a)", "node 1 (b)", "node 2 (c)"]
    good = [View(seen=frozenset({0, 1, 2}), clock_s=100.0)] * 3
    judge(Path("/run"), names, good, 600)
    assert caplog.messages == []
    apart = [View(seen=frozenset({0, 1}), clock_s=100.0)] * 2 + [View(seen=frozenset({2}), clock_s=100.0)]
    with pytest.raises(UserError, match=r"^/run: what node 2 \(c\) has there is not the file system of node 0 \(a\)"):
        judge(Path("/run"), names, apart, 600)
    judge(Path("/run"), names, [*good[:2], dataclasses.replace(good[2], clock_s=103.0)], 600)
    assert caplog.messages == ["the clock of node 2 (c) is +3.0 s off node 0 (a)'s; let chrony or ntpd set both"]
    with pytest.raises(UserError, match=r"the clock of node 1 \(b\) is -400 s off node 0 \(a\)'s"):
        judge(Path("/run"), names, [good[0], dataclasses.replace(good[1], clock_s=-300.0), good[2]], 600)


def test_a_node_with_another_file_system_at_the_same_path_ends_both(pair, tmp_path):
    # one path that means another folder in each process, as a mount that is missing on one node would
    both = pair("run.folder=/proc/self/cwd/run", *SMALL, *TWO).wait()
    for code, said in both:
        assert code == 2
        assert "/proc/self/cwd/run: what node 1 (" in said
        assert "is not the file system of node 0 (" in said
    for node in ("node0", "node1"):
        assert not (tmp_path / node / "run" / "config.yaml").exists()


def test_two_commands_that_differ_end_both(pair, tmp_path):
    words = [f"run.folder={tmp_path / 'run'}", *SMALL, *TWO]
    for code, said in pair(*words, other=(*words, "npd.epochs=4")).wait():
        assert code == 2
        assert "node 1 (" in said
        assert "runs another configuration than node 0" in said
        assert "npd.epochs is 4 instead of 1" in said


def test_a_check_that_fails_on_one_node_ends_the_other(pair, tmp_path):
    """Relative to where it was typed, the weights are only there on node 0; the paths are the same."""
    folder = tmp_path / "node0" / "student"
    folder.parent.mkdir()
    folder.symlink_to(CONFIGS / "addition" / "student")
    words = [f"run.folder={tmp_path / 'run'}", *SMALL, *TWO, "student.path=/proc/self/cwd/student"]
    (first, said), (second, reason) = pair(*words).wait()
    assert (first, second) == (2, 2)
    assert "/proc/self/cwd/student" in reason
    assert said.startswith("npd run: node 1 (")
    assert "stopped: the check before the run ended with exit code 2" in said


@pytest.fixture
def meeting_place():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


def _node(store, rank: int) -> Node:
    return Node(rank, 2, "127.0.0.1", store.port)


def test_who_comes_back_early_waits_and_does_not_count_past_the_others(meeting_place):
    """Node 1 lost a rank; those of node 0 notice only once node 1 has given up waiting for them, and more than once."""
    with ThreadPoolExecutor(2) as pool:

        def both() -> list[int]:
            return list(pool.map(lambda rank: next_meeting(_node(meeting_place, rank), 20), (0, 1)))

        assert both() == [1, 1]
        for _ in range(2):
            with pytest.raises(
                LostRankError, match=r"waited 0 s \(parallel.timeout_s\) for the ranks of node 0; the same"
            ):
                next_meeting(_node(meeting_place, 1), 0)
        assert both() == [2, 2]
        assert both() == [3, 3]


def test_who_comes_again_finds_the_others_there_already(meeting_place):
    """Node 1 gave up; node 0 then came and went ahead to its ranks, which wait there for those of node 1."""
    with pytest.raises(LostRankError):
        next_meeting(_node(meeting_place, 1), 0)
    assert next_meeting(_node(meeting_place, 0), 0) == 1
    assert next_meeting(_node(meeting_place, 1), 0) == 1


def test_who_missed_a_meeting_comes_to_the_next(meeting_place):
    """The ranks of node 0 gave up on those of node 1 before it came again: nobody goes where nobody waits."""
    with pytest.raises(LostRankError):
        next_meeting(_node(meeting_place, 1), 0)
    assert next_meeting(_node(meeting_place, 0), 0) == 1
    with pytest.raises(LostRankError, match="node 1"):
        next_meeting(_node(meeting_place, 0), 0)
    assert next_meeting(_node(meeting_place, 1), 0) == 2
    assert next_meeting(_node(meeting_place, 0), 0) == 2


def test_a_host_that_answers_nothing_is_lost_after_a_while(monkeypatch):
    """As one without power: no connection is closed."""
    monkeypatch.setattr(nodes, "_LOST_S", 1)
    code = (
        "import time, torch.distributed as d; s = d.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False); "
        "print(s.port, flush=True); time.sleep(600)"
    )
    host = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        port = int(host.stdout.readline())
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
        here = Nodes(Node(1, 2, "127.0.0.1", port), store)
        here.say("host", "b")
        host.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(UserError, match=f"node 0 at 127.0.0.1:{port} is gone; the same command on every node"):
            here.meet("a step")
        here.leave("lost")
        assert time.monotonic() - started < 20
    finally:
        host.kill()
        host.communicate()


@pytest.mark.parametrize(("under_way", "ends_the_run"), [(True, False), (False, True)])
def test_a_command_typed_twice_does_not_end_a_run_that_is_under_way(meeting_place, under_way, ends_the_run):
    store = dist.TCPStore("127.0.0.1", meeting_place.port, is_master=False)
    first, second = (Nodes(_node(meeting_place, rank), meeting_place) for rank in (0, 1))
    store.add("joined as node 1", 1)
    second.say("host", "b")
    if under_way:
        first.say("host", "a")
    stray = Nodes(_node(meeting_place, 1), store)
    with pytest.raises(UserError, match="NODE_RANK=1 was here before") as refused:
        stray.join(load_config(ADDITION))
    stray.leave(str(refused.value))
    assert first._has("end", 1) == ends_the_run


def test_what_another_version_of_the_project_wants_is_told_apart(meeting_place):
    here = Nodes(_node(meeting_place, 0), meeting_place)
    theirs = dump_config(load_config(ADDITION)) + "later_key: 3\n"
    with pytest.raises(
        UserError, match=r"node 1 runs another configuration .*later_key is 3 instead of None; .*version"
    ):
        here._check_same([dump_config(load_config(ADDITION)), theirs])
    here._check_same([theirs, theirs])


def test_a_meeting_place_that_cannot_be_is_told(meeting_place):
    port = meeting_place.port
    with pytest.raises(UserError, match=f"MASTER_PORT={port}: node 0 cannot listen there .*free port, on every node"):
        nodes._open_store(Node(0, 2, "127.0.0.1", port), 1)
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        nobody = Node(1, 2, "127.0.0.1", taken.getsockname()[1])
        with pytest.raises(UserError, match=r"node 0 did not answer within 1 s \(parallel.timeout_s\); start the same"):
            nodes._open_store(nobody, 1)


def test_a_run_folder_that_is_no_folder_is_told(meeting_place, tmp_path):
    here = Nodes(_node(meeting_place, 0), meeting_place)
    here.say("token", "x")
    (tmp_path / "run").write_text("")
    with pytest.raises(
        UserError, match=f"^{tmp_path}/run/nodes: Not a directory; set run.folder to a place that every"
    ):
        nodes._exchange_tokens(here, tmp_path / "run" / "nodes", 1)


@pytest.mark.slow
def test_two_nodes_train_the_student_of_one_and_survive_a_lost_rank(pair, tmp_path):
    words = [*SMALL, "sft.epochs=12", "sft.checkpoint_every_steps=5"]
    both = pair(f"run.folder={tmp_path / 'two'}", *words, *TWO)
    metrics = tmp_path / "two" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.exists() or metrics.read_text().count("train/loss") < 8:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    second = next(pid for pid in _descendants(both.nodes[1].pid) if _says(pid, b"RANK=1"))
    os.kill(second, signal.SIGKILL)
    assert [code for code, _ in both.wait()] == [0, 0]
    alone = ["--config", ADDITION, f"run.folder={tmp_path / 'one'}", *words]  # one rank, one worker of each kind
    assert [npd_here(stage, *alone).returncode for stage in ("sft", "rollout", "score", "distill")] == [0] * 4
    wanted, got = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("one", "two"))
    for name, value in wanted.items():
        assert (got[name] - value).norm() <= 1e-3 * value.norm(), name
    assert "was killed by SIGKILL; restart 1 of 5" in (tmp_path / "two" / "logs" / "run.node1.log").read_text()


def _descendants(pid: int) -> list[int]:
    children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*children, *(grandchild for child in children for grandchild in _descendants(child))]


def _says(pid: int, variable: bytes) -> bool:
    return variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
