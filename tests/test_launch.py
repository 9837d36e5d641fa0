"""The trainer as real processes: one layout against another, a rank that dies, a rank that hangs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import npd_here
from conftest import CONFIGS
from safetensors.torch import load_file

ROOT = CONFIGS.parent


def _settings(folder, *overrides):
    small = ["data.gold.count=200", "sft.epochs=3", "sft.pack_tokens=512", "sft.packs_per_step=3"]
    return ["--config", str(CONFIGS / "addition_cpu.yaml"), f"run.folder={folder}", *small, *overrides]


def _command(folder, *overrides):
    return [sys.executable, "-m", "npd_ascend", "sft", *_settings(folder, *overrides)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The student of one rank."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert npd_here("sft", *_settings(folder)).returncode == 0
    return folder


def _weights(folder):
    return load_file(folder / "weights" / "v0" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    ["parallel.tp=2", "parallel.dp=2", "parallel.tp=2 parallel.dp=2 parallel.sequence_parallel=true"],
)
def test_npd_starts_the_ranks_and_trains_the_same_student(one, tmp_path, layout):
    subprocess.run(_command(tmp_path / "many", *layout.split()), check=True, cwd=ROOT)
    wanted, got = _weights(one), _weights(tmp_path / "many")
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (got[name] - value).norm() <= 1e-3 * value.norm(), name  # some twenty steps of Adam apart
    assert len((tmp_path / "many/logs/stages.jsonl").read_text().splitlines()) == 1
    assert _steps(tmp_path / "many") == _steps(one)


@pytest.mark.slow
@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_lost_rank_stops_the_others_with_a_message(tmp_path, signal_):
    """Within the time-out, with nothing left running."""
    command = _command(tmp_path / "run", "parallel.tp=2", "parallel.timeout_s=8", "sft.epochs=400")
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    children = _wait_for(lambda: _children(launcher.pid) if _steps(tmp_path / "run") > 10 else None)
    assert len(children) == 2
    second = next(pid for pid in children if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    os.kill(second, signal_)
    _, said = launcher.communicate(timeout=200)
    assert launcher.returncode == (128 + signal.SIGKILL if signal_ == signal.SIGKILL else 75)
    assert "rank 0 of 2 lost another rank or waited 8 s (parallel.timeout_s)" in said
    assert ("rank 1 was killed by SIGKILL" in said) == (signal_ == signal.SIGKILL)
    assert "Traceback" not in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


@pytest.mark.slow
def test_npd_run_starts_ranks_again_of_which_one_hangs(tmp_path):
    more = ["parallel.tp=2", "parallel.timeout_s=8", "sft.epochs=20", "sft.checkpoint_every_steps=5", "npd=null"]
    command = [word if word != "sft" else "run" for word in _command(tmp_path / "run", *more)]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT)
    ranks = _wait_for(lambda: _ranks(run.pid) if _steps(tmp_path / "run") > 12 else None)
    os.kill(ranks[1], signal.SIGSTOP)
    _, said = run.communicate(timeout=400)
    assert run.returncode == 0, said
    assert "npd sft lost one of its ranks; restart 1 of 5" in said
    assert "going on at epoch" in said
    assert (tmp_path / "run" / "student").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on_with_another_layout(tmp_path):
    # a small learning rate, so that eighty steps do not carry rounding far
    longer = ["sft.epochs=40", "sft.checkpoint_every_steps=5", "sft.optimizer.lr=1e-3"]
    killed = subprocess.Popen(_command(tmp_path / "run", *longer, "parallel.tp=2"), cwd=ROOT)
    children = _wait_for(lambda: _children(killed.pid) if _steps(tmp_path / "run") > 12 else None)
    killed.kill()
    killed.wait()
    _wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))  # they die with their parent
    done = subprocess.run(
        _command(tmp_path / "run", *longer, "parallel.dp=2"), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "goes on with parallel.tp=1 instead of 2" in done.stderr
    assert "going on at epoch" in done.stderr
    assert npd_here("sft", *_settings(tmp_path / "one", *longer)).returncode == 0
    wanted, got = _weights(tmp_path / "one"), _weights(tmp_path / "run")
    for name, value in wanted.items():
        assert (got[name] - value).norm() <= 1e-2 * value.norm(), name  # eighty steps of Adam apart


def test_a_rank_started_by_hand_in_the_wrong_number_is_told(tmp_path):
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "3", "NPD_RENDEZVOUS": f"file://{tmp_path}/store"}
    done = subprocess.run(
        _command(tmp_path / "run", "parallel.tp=2"), env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert "wants 2 processes but this is one of 3" in done.stderr


def _steps(folder):
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count("train/loss") if metrics.exists() else 0


def _children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _ranks(pid):
    """rank -> pid, of the stage that the supervisor `pid` runs."""
    found = {}
    for stage in _children(pid):
        for child in _children(stage):
            for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                if entry.startswith(b"RANK="):
                    found[int(entry[5:])] = child
    return found if len(found) == 2 else None


def _wait_for(condition):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError("waited 300 s in vain")
