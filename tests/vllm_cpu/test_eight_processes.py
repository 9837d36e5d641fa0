"""launch/npd_8npu.sh with NPD_DEVICE=cpu: eight processes make the student of one process."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from conftest import CONFIGS
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


def test_the_layout_of_a_node_makes_the_student_of_one_process(tmp_path):
    node, one = tmp_path / "node", tmp_path / "one"
    script = ["bash", "launch/npd_8npu.sh", f"run.folder={node}", *SETTINGS]
    environment = os.environ | {"NPD_DEVICE": "cpu"}
    done = subprocess.run(script, capture_output=True, text=True, env=environment, cwd=CONFIGS.parent, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PanguEmbedded" in (node / "student" / "config.json").read_text()
    for process in ("distill.rank3", "rollout-0", "rollout-1", "rollout-2", "score"):
        assert (node / "logs" / f"{process}.log").exists()

    config = yaml.safe_load((node / "config.yaml").read_text())
    config["run"]["folder"] = str(one)
    config["parallel"] |= {"tp": 1, "dp": 1}
    config["processes"] |= {"rollout": 1}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(config))
    shutil.copytree(node / "weights" / "v0", one / "weights" / "v0")  # the same start
    for name in ("rollout", "score", "distill"):
        command = [sys.executable, "-m", "npd_ascend", name, "--config", str(tmp_path / "one.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    wanted, got = (load_file(folder / "student" / "model.safetensors") for folder in (one, node))
    for name, value in wanted.items():
        assert (got[name] - value).norm() <= 1e-3 * value.norm(), name
    assert Path(node / "report.html").exists()
