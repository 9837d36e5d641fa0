"""GRPO whose groups are answered by vLLM: new weights at every step, and the ratio of the trainer to the generator."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import CONFIGS
from killing import kill_in_shard

from npd_ascend.metrics import read_metrics
from npd_ascend.rollout.journal import Journal, journal_path, read_journal
from npd_ascend.stream import Stream

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


def test_the_answers_of_a_worker_that_is_killed_in_a_shard_are_kept(folders, tmp_path):
    """SIGKILL; and the next one goes on with the version that the shard was begun with, though there is a newer one."""
    run = Path(shutil.copytree(folders["disk"], tmp_path / "run"))
    weights, stream = run / "grpo" / "weights", Stream(run / "grpo" / "stream")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["rollout"]["kv_cache_gib"] = 0.0005  # for one answer at a time, so that there is a middle
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    made = stream.read("rollouts", 1)
    lines = stream.manifest.read_text().splitlines(keepends=True)
    stream.manifest.write_text(
        "".join(x for x in lines if (e := json.loads(x))["kind"] != "rollouts" or e["shard"] != 1)
    )

    command = [sys.executable, "-m", "npd_ascend", "grpo-rollout", "--run", str(run)]
    journal = journal_path(stream.folder, 1, 1)
    (weights / "v2").rename(tmp_path / "v2")
    kill_in_shard(command, journal, 5, tmp_path / "said")
    (tmp_path / "v2").rename(weights / "v2")
    asked, kept, _ = read_journal(journal)
    assert 5 <= len(kept) < len(made) == 64
    first = next(iter(kept))
    with Journal(journal, asked) as opened:  # what no model would say: it is not asked again
        opened.add(first, replace(kept[first], logprobs=kept[first].logprobs - 1))
    kept = read_journal(journal)[1]

    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not journal.exists()
    again = Stream(stream.folder).read("rollouts", 1)
    assert [(r.sample_id, r.token_ids) for r in again] == [(r.sample_id, r.token_ids) for r in made]
    for index, answer in kept.items():
        assert again[index].logprobs.tobytes() == answer.logprobs.tobytes()
    apart = [np.abs(one.logprobs - other.logprobs).max() for one, other in zip(again, made, strict=True)]
    assert [index for index, nats in enumerate(apart) if nats > 1e-4] == [first]
    (row,) = [r for r in read_metrics(run) if r["step"] == 1 and "rollout/resumed" in r]
    assert (row["rollout/resumed"], row["rollout/version"], row["rollout/samples"]) == (len(kept), 1, 64)
