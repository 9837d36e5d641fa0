"""device.kind: npu from end to end, on a device that is none: npu_stand_in/torch_npu has memory of its own, which no
operator mixes with the host's, and computes with the kernels of the CPU."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from command import npd_here
from conftest import CONFIGS
from safetensors.torch import load_file
from torch.utils import cpp_extension

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
SMALL = ["data.gold.count=120", "data.prompts.count=120", "data.heldout.count=24", "sft.epochs=2", "npd.epochs=2"]
SMALL += ["npd.refresh_after=[]", "npd.checkpoint_every_steps=4", "evaluate.every_steps=4", "evaluate.answers=8"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler, which the stand-in for a device wants")
    library, source = tmp_path_factory.mktemp("stand-in") / "device.so", HERE / "npu_stand_in" / "torch_npu"
    flags = [f"-I{folder}" for folder in [sysconfig.get_path("include"), *cpp_extension.include_paths()]]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    flags += [f"-L{folder}" for folder in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch_python"]
    command = ["c++", "-O1", "-std=c++20", "-shared", "-fPIC", str(source / "device.cpp"), "-o", str(library), *flags]
    subprocess.run(command, check=True)
    return os.environ | {
        "PYTHONPATH": f"{source.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "NPD_STAND_IN": str(library),
        "ASCEND_RT_VISIBLE_DEVICES": "5",
        "OMP_NUM_THREADS": "1",
    }


def python(environment: dict[str, str], *words: str | Path) -> str:
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_whole_run_makes_the_student_of_the_cpu(environment, tmp_path):
    words = ["--config", CONFIGS / "addition_cpu.yaml", *SMALL]
    python(environment, "-m", "npd_ascend", "run", *words, f"run.folder={tmp_path / 'npu'}", "device.kind=npu")
    for stage in ("sft", "rollout", "score", "distill"):
        assert npd_here(stage, *words, f"run.folder={tmp_path / 'cpu'}", "device.threads=1").returncode == 0
    there, here = (load_file(tmp_path / kind / "student" / "model.safetensors") for kind in ("npu", "cpu"))
    for name, wanted in here.items():
        assert (there[name] - wanted).norm() < 1e-4 * wanted.norm(), name
    scores = json.loads((tmp_path / "npu" / "summary.json").read_text())["scores"]
    assert scores["teacher"] == 1


def test_a_tensor_that_was_left_on_the_host_is_seen(environment):
    code = """
import sys
from pathlib import Path

import torch
from npd_ascend import packing
from npd_ascend.config import KernelConfig
from npd_ascend.device import open_device
from npd_ascend.model.load import load_decoder
from npd_ascend.teacher.local import score_answers

device = open_device("npu", 0)
model = load_decoder(Path(sys.argv[1]), dtype=torch.float32, device=device)
ask = lambda: score_answers(model, [((3, 4, 5, 6), 2)], top_k=2, vocab_size=8, pack_tokens=16)
ask()
packing.to_device = lambda values, device: torch.from_numpy(values)
try:
    ask()
except RuntimeError as error:
    print(error)
"""
    assert "tensors of two devices, npu and cpu" in python(environment, "-c", code, CONFIGS / "addition" / "teacher")


def test_a_rank_uses_its_own_card_and_no_other(environment, tmp_path):
    """Nor does the thread that writes its checkpoints, which asks for no stream."""
    code = """
import sys
from pathlib import Path

import torch
from npd_ascend.checkpoint import Checkpoints, Rectangle
from npd_ascend.device import open_device

device = open_device("npu", 0)
values = torch.zeros(2, device=device)
checkpoints = Checkpoints(Path(sys.argv[1]))
checkpoints.save({"step": 1}, [Rectangle("x", (0,), (2,), values)])
checkpoints.wait()
print(device, values.device, torch.npu.current_device(), torch.npu.Stream.streams)
"""
    assert python(environment | {"LOCAL_RANK": "3"}, "-c", code, tmp_path).split() == ["npu:3", "npu:3", "3", "set()"]
