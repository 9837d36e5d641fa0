"""launch/npd_8npu.sh with NPD_DEVICE=cpu: eight processes make the student of one process."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from conftest import CONFIGS
from listening import LOOPBACK, listening
from safetensors.torch import load_file

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed; launch/test.sh runs this in an environment of its own", allow_module_level=True)

SETTINGS = [
    "data.gold.count=100",
    "data.prompts.count=300",
    "data.heldout.count=40",
    "sft.epochs=3",
    "npd.epochs=1",
    "npd.stream.publish_every=1000",  # one version, so that rounding cannot change what is sampled
    "rollout.batch_size=64",
]


def descendants(pid: int) -> set[int]:
    found = {pid}
    with suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found |= descendants(int(child))
    return found


def watched(command: list[str], folder: Path, **environment: str) -> None:
    """A command with all that it starts, none of which may listen beyond this host."""
    with (folder / "said").open("w") as said:
        environment = os.environ | environment
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment, cwd=CONFIGS.parent)
        opened: set[str] = set()
        while process.poll() is None:
            opened |= listening(descendants(process.pid))
            time.sleep(0.2)
    assert process.returncode == 0, (folder / "said").read_text()
    assert opened <= LOOPBACK, "a port is open beyond this host"
    assert opened  # gloo's, at least


def test_the_layout_of_a_node_makes_the_student_of_one_process(tmp_path):
    node, one = tmp_path / "node", tmp_path / "one"
    script = ["bash", "launch/npd_8npu.sh", f"run.folder={node}", *SETTINGS]
    watched(script, tmp_path, NPD_DEVICE="cpu")
    assert "PanguEmbedded" in (node / "student" / "config.json").read_text()
    for process in ("distill.rank3", "rollout-0", "rollout-1", "rollout-2", "score"):
        assert (node / "logs" / f"{process}.log").exists()

    config = yaml.safe_load((node / "config.yaml").read_text())
    config["run"]["folder"] = str(one)
    config["parallel"] |= {"tp": 1, "dp": 1}
    config["processes"] |= {"rollout": 1}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(config))
    alone(tmp_path / "one.yaml", "sft")
    assert_equal(one / "weights" / "v0", node / "weights" / "v0")
    # from the very same start, since a rounding apart another token may be sampled
    shutil.copytree(node / "weights" / "v0", one / "weights" / "v0", dirs_exist_ok=True)
    for stage in ("rollout", "score", "distill"):
        alone(tmp_path / "one.yaml", stage)
    assert_equal(one / "student", node / "student")
    assert Path(node / "report.html").exists()


def alone(config: Path, stage: str) -> None:
    command = [sys.executable, "-m", "npd_ascend", stage, "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def assert_equal(wanted: Path, got: Path) -> None:
    """In float32, but for the order of sums: 1e-3 of every parameter's norm."""
    wanted, got = (load_file(folder / "model.safetensors") for folder in (wanted, got))
    for name, value in wanted.items():
        assert (got[name] - value).norm() <= 1e-3 * value.norm(), name


def test_with_new_weights_from_the_trainers_memory_it_is_the_student_of_one_process_too(tmp_path):
    """Where samples depend on the weights before them, so one process trains on those that eight have made."""
    node, one = tmp_path / "node", tmp_path / "one"
    command = [sys.executable, "-m", "npd_ascend", "run", "--config", "configs/openpangu_tiny_8cpu.yaml"]
    command += [f"run.folder={node}", *SETTINGS, "npd.epochs=2", "npd.stream.publish_every=3", "rollout.weights=memory"]
    watched(command, tmp_path)
    rows = [json.loads(line) for line in (node / "metrics.jsonl").read_text().splitlines()]
    assert sum("sync/transfer_s" in row for row in rows) >= 2
    assert all(row["rollout/canary"] < 2e-3 for row in rows if "rollout/canary" in row)
    logs = "".join((node / "logs" / f"rollout-{number}.log").read_text() for number in range(3))
    assert "it is loaded from disk" not in logs
    assert not (node / "weights" / "sender.json").exists()

    config = yaml.safe_load((node / "config.yaml").read_text())
    config["run"]["folder"] = str(one)
    config["parallel"] |= {"tp": 1, "dp": 1}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(config))
    shutil.copytree(node / "stream", one / "stream")
    shutil.copytree(node / "weights" / "v0", one / "weights" / "v0")
    alone(tmp_path / "one.yaml", "distill")
    versions = {row["rollout/version"] for row in rows if "rollout/version" in row}
    assert len(versions) > 2
    assert_equal(one / "student", node / "student")
