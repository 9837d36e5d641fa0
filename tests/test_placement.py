"""Which processes a run has and which cards they get; the launch script's listing."""

import importlib.util
import itertools
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CONFIGS

from npd_ascend import ranks
from npd_ascend.config import load_config
from npd_ascend.errors import UserError
from npd_ascend.placement import listing, place, recipe

ADDITION = CONFIGS / "addition_cpu.yaml"
STREAM = ["npd.refresh_after=[]", "npd.stream={}", "processes={rollout: 3, teacher: 1}", "parallel={tp: 2, dp: 2}"]
STAGES = ("sft", "npd", "grpo", "eval")
PERMISSION = "run_code_of=[mbpp, humaneval]"
CARDS = [str(card) for card in range(8)]


def test_who_starts_the_processes_does_not_wait_for_torch():
    code = "import sys, npd_ascend.supervisor, npd_ascend.nodes; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_the_benchmark_for_npus_asks_for_fits_a_node_of_eight(monkeypatch, tmp_path):
    script = (CONFIGS.parent / "benchmarks" / "npu.sh").read_text().replace("\\\n", " ")
    words = shlex.split(next(line for line in script.splitlines() if "measure schedules" in line))
    spec = importlib.util.spec_from_file_location("schedules", CONFIGS.parent / "benchmarks" / "schedules.py")
    schedules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(schedules)
    groups = {}

    def run(config, folder, overrides):
        loaded = load_config(CONFIGS.parent / config, overrides)
        groups[folder.name] = recipe(loaded)
        for group in groups[folder.name]:
            place(loaded, group, CARDS)

    monkeypatch.setattr(schedules, "run", run)
    monkeypatch.setattr(schedules, "measure", lambda folder: {"answer_tokens_per_hour": 1})
    monkeypatch.setattr(sys, "argv", [*words[1:], "--folder", str(tmp_path)])
    schedules.main()
    assert names(groups["on-policy"][0]) == ["distill", "rollout-0", "rollout-1", "rollout-2", "score"]
    assert len(groups["cycle"]) == 8


def names(group):
    return [process.name for process in group]


def test_what_runs_side_by_side_shares_no_card():
    config = load_config(ADDITION, [*STREAM, "device.kind=npu"])
    live = next(group for group in recipe(config) if len(group) > 1)
    assert names(live) == ["distill", "rollout-0", "rollout-1", "rollout-2", "score"]
    placed = [environment["ASCEND_RT_VISIBLE_DEVICES"] for environment in place(config, live, CARDS).values()]
    assert placed == ["0,1,2,3", "4", "5", "6", "7"]
    assert place(load_config(ADDITION, STREAM), live, []) == {key: {} for key in names(live)}  # a CPU has none to share
    with pytest.raises(UserError, match=r"and no driver's file of one is in /dev; .*in ASCEND_RT_VISIBLE_DEVICES$"):
        place(config, live, [])  # all would open the first


@pytest.mark.parametrize(
    ("kind", "variable", "files", "others"),
    [
        ("npu", "ASCEND_RT_VISIBLE_DEVICES", "davinci", ["davinci_manager", "nvidia0"]),
        ("cuda", "CUDA_VISIBLE_DEVICES", "nvidia", ["nvidiactl", "nvidia-uvm", "davinci0"]),
    ],
)
def test_cards_are_those_of_the_variable_or_as_many_as_the_driver_has_files(
    kind, variable, files, others, monkeypatch, tmp_path
):
    for name in ("ASCEND_RT_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ranks, "_DEV", tmp_path)
    for name in (f"{files}4", f"{files}11", *others):  # as in a container that has two cards of a larger host
        (tmp_path / name).touch()
    assert ranks.visible_cards(kind) == ["0", "1"]
    assert ranks.visible_cards("cpu") == []
    monkeypatch.setenv(variable, "2,3,5")
    assert ranks.visible_cards(kind) == ["2", "3", "5"]
    config = load_config(ADDITION, [f"device.kind={kind}", "parallel.dp=2"])
    placed = place(config, recipe(config)[0], ranks.visible_cards(kind))
    assert placed == {"sft": {variable: "2,3"}}


def test_stages_of_the_cycle_take_turns_on_all_cards():
    more = ["npd.refresh_after=[5]", "processes={rollout: 8, teacher: 8}", "parallel.dp=8", "device.kind=npu"]
    config = load_config(ADDITION, more)
    groups = recipe(config)
    assert [len(group) for group in groups] == [1, 8, 8, 1, 8, 8, 1, 1, 1]
    for group in groups[:-1]:
        used = [environment["ASCEND_RT_VISIBLE_DEVICES"] for environment in place(config, group, CARDS).values()]
        assert used[0].startswith("0")
        assert len(",".join(used).split(",")) == (8 if group is not groups[-2] else 1)


def test_with_overlap_the_next_set_is_made_beside_the_trainer():
    config = load_config(ADDITION, ["npd.refresh_after=[3, 6]", "npd.overlap=true"])
    assert [names(group) for group in recipe(config)] == [
        ["sft"],
        ["rollout"],
        ["score"],
        ["distill", "rollout", "score"],
        ["distill", "rollout", "score"],
        ["distill"],
        ["eval"],
        ["report"],
    ]


def test_too_few_cards_are_told_with_who_wants_them():
    config = load_config(ADDITION, [*STREAM, "device.kind=npu"])
    live = next(group for group in recipe(config) if len(group) > 1)
    with pytest.raises(UserError, match=r"8 cards are wanted side by side \(distill 4, rollout-0 1.* and 7 are here"):
        place(config, live, CARDS[:7])
    elsewhere = load_config(ADDITION, [*STREAM, "device.kind=npu", "processes.ray=10.0.0.1:6379"])
    assert place(elsewhere, live, CARDS[:4])["rollout-0"] == {}  # Ray gives it a card of some node


def test_the_listing_is_what_would_be_started():
    config = load_config(ADDITION, STREAM)
    text = listing(config)
    for group in recipe(config):
        for process in group:
            assert " ".join(["npd", *process.command(config)[3:]]) in text
    for rank in range(4):
        assert f"RANK={rank} LOCAL_RANK={rank} WORLD_SIZE=4 NPD_RENDEZVOUS=file://" in text


@pytest.mark.parametrize(
    "more",
    [[], ["npd.refresh_after=[]", "npd.packs_per_step=1", "npd.stream={}", "parallel.dp=4", "processes={rollout: 3}"]],
)
def test_the_launch_script_says_what_it_would_start_on_a_machine_without_cards(more):
    words = ["bash", "launch/npd_8npu.sh", "--dry-run", *more]
    python = Path(os.sys.executable).parent
    environment = {k: v for k, v in os.environ.items() if k != "NPD_DEVICE"} | {
        "PATH": f"{python}:{os.environ['PATH']}",
        "VLLM_ASCEND_ENABLE_NZ": "1",  # which no rollout worker would have
    }
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=CONFIGS.parent, check=False)
    assert done.returncode == 0, done.stderr
    assert "   HCCL_BUFFSIZE=256\n" in done.stdout
    assert "   VLLM_ASCEND_ENABLE_NZ=0\n" in done.stdout
    cards = [
        line.split("ASCEND_RT_VISIBLE_DEVICES=")[1].split()[0]
        for line in done.stdout.splitlines()
        if "_RT_VISIBLE" in line
    ]
    if more:
        assert cards == ["0,1,2,3", "4", "5", "6", "7", "0"]
    else:
        all_cards = ",".join(CARDS)
        assert cards == [*CARDS, *CARDS, all_cards, *CARDS, *CARDS, all_cards, "0"]


def reproduction(*words, **variables):
    environment = {k: v for k, v in os.environ.items() if k != "NPD_DEVICE"} | {"PYTHON": os.sys.executable} | variables
    command = ["bash", "launch/repro_openpangu_1b.sh", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=CONFIGS.parent, check=False)


def test_the_stages_of_the_reproduction_take_the_student_of_the_stage_before():
    done = reproduction("--dry-run", PERMISSION)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("==")] == [f"== {name}" for name in STAGES]
    for name in ("openpangu_1b", "openpangu_tiny"):
        stages = [load_config(CONFIGS / "repro" / name / f"{stage}.yaml") for stage in STAGES[:3]]
        for before, after in itertools.pairwise(stages):
            assert after.student.path == before.run.folder / "student"
            assert name != "openpangu_1b" or f"--run {after.run.folder}" in done.stdout
        last = stages[-1].run.folder.relative_to(CONFIGS.parent)
        assert str(last) == f"runs/{name}_grpo"
    words = ["eval", "--benchmarks", "configs/repro/openpangu_1b/eval.yaml", PERMISSION]
    assert shlex.split(done.stdout.splitlines()[-1])[-5:] == [*words, "model.path=runs/openpangu_1b_grpo/student"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "allow it with run_code_of"),
        ([PERMISSION, "model.path=configs/openpangu_tiny"], "package lm_eval is not installed"),
        (["--noeval"], "does not know --noeval"),
        (["--no-eval", "parallel.dp=4"], "parallel.dp=4 is for the benchmarks, which --no-eval leaves out"),
    ],
)
def test_what_the_last_stage_of_the_reproduction_lacks_is_said_before_the_first(words, said, tmp_path):
    if "lm_eval" in said and importlib.util.find_spec("lm_eval"):
        pytest.skip("lm_eval is installed")
    (tmp_path / "cann").mkdir()
    (tmp_path / "cann" / "set_env.sh").write_text("")
    done = reproduction(*words, ASCEND_INSTALL=str(tmp_path))
    assert done.returncode == 2
    assert said in done.stderr
    assert "==" not in done.stdout
