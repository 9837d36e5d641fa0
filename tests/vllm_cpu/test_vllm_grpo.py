"""GRPO whose groups are answered by vLLM: new weights at every step, and the ratio of the trainer to the generator."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import CONFIGS

from npd_ascend.metrics import read_metrics

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed; launch/test.sh runs this in an environment of its own", allow_module_level=True)

SETTINGS = [
    "data.gold.count=200",
    "data.heldout.count=60",
    "sft.epochs=6",
    "rollout.engine=vllm",
    "rollout.kv_cache_gib=0.05",
    "rollout.batch_size=64",
    "grpo.steps=3",
    "grpo.groups_per_step=16",
    "grpo.group_size=4",
    "grpo.rewards={format: 1}",
    "grpo.format='[0-9]{4}'",  # some answers have it from the start, so that there is something to learn
    "device.threads=1",
]


def trained(folder: Path, weights: str) -> Path:
    command = [sys.executable, "-m", "npd_ascend", "run", "--config", str(CONFIGS / "addition_grpo.yaml")]
    command += [f"run.folder={folder}", *SETTINGS, f"rollout.weights={weights}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The same GRPO with new weights from disk and from the trainer's memory, after one SFT."""
    made = {"disk": trained(tmp_path_factory.mktemp("disk") / "run", "disk")}
    folder = tmp_path_factory.mktemp("memory") / "run"
    shutil.copytree(made["disk"] / "grpo" / "weights" / "v0", folder / "grpo" / "weights" / "v0")
    return made | {"memory": trained(folder, "memory")}


@pytest.mark.parametrize("weights", ["disk", "memory"])
def test_every_step_is_answered_with_the_weights_of_the_step_before(folders, weights):
    rows = read_metrics(folders[weights])
    made = [row for row in rows if row["stage"] == "grpo-rollout" and "rollout/version" in row]
    assert [row["rollout/version"] for row in made] == [0, 1, 2]
    canaries = [row["rollout/canary"] for row in rows if "rollout/canary" in row]
    assert len(canaries) == 3
    assert max(canaries) < 1e-4
    steps = [row for row in rows if row["stage"] == "grpo" and "train/drift" in row]
    assert [row["step"] for row in steps] == [0, 1, 2]
    assert all(row["grpo/no_signal"] < 1 for row in rows if "grpo/no_signal" in row)
    # vLLM's log-probs against the trainer's before it changes anything: KL is rounding, and stale weights would show
    assert all(abs(row["train/drift"]) < 1e-6 for row in steps)
    assert all(row["grpo/clipped"] == 0 for row in steps)


def test_weights_come_from_memory_and_end_where_those_from_disk_do(folders):
    """Bit for bit: what is answered is a function of the weights and the seeds."""
    rows = {name: read_metrics(folder) for name, folder in folders.items()}
    assert [row["step"] for row in rows["memory"] if "sync/transfer_s" in row] == [1, 2]  # version 0 is on disk
    assert not any("sync/transfer_s" in row for row in rows["disk"])
    assert "it is loaded from disk" not in (folders["memory"] / "logs" / "grpo-rollout.log").read_text()
    assert not (folders["memory"] / "grpo" / "weights" / "sender.json").exists()
    one, other = ((folder / "student" / "model.safetensors").read_bytes() for folder in folders.values())
    assert one == other
