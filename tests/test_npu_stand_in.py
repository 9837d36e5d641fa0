"""device.kind: npu from end to end, on a device that is none: npu_stand_in/torch_npu has memory of its own, which no
operator mixes with the host's, and computes with the kernels of the CPU. Its HCCL is gloo on that memory."""

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from command import npd_here
from conftest import CONFIGS
from safetensors.torch import load_file
from torch.utils import cpp_extension

from npd_ascend.config import KernelConfig
from npd_ascend.planner.command import HEADROOM
from npd_ascend.planner.rates import ASCEND

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
RECIPE = [
    "--config",
    CONFIGS / "addition_cpu.yaml",
    "data.gold.count=120",
    "data.prompts.count=120",
    "data.heldout.count=24",
    "sft.epochs=2",
    "npd.epochs=2",
]
RECIPE += ["npd.refresh_after=[]", "npd.checkpoint_every_steps=4", "evaluate.every_steps=4", "evaluate.answers=8"]


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
        "ASCEND_RT_VISIBLE_DEVICES": "1,2,5,6",
        "OMP_NUM_THREADS": "1",
    }


def python(environment: dict[str, str], *words: str | int | Path) -> str:
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def student_of_the_cpu(tmp_path_factory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("cpu") / "run"
    for stage in ("sft", "rollout", "score", "distill"):
        done = npd_here(stage, *RECIPE, f"run.folder={folder}", "device.threads=1")
        assert done.returncode == 0, done.stderr
    return load_file(folder / "student" / "model.safetensors")


@pytest.mark.parametrize("layout", [[], ["parallel.tp=2", "parallel.dp=2", "parallel.sequence_parallel=true"]], ids=len)
def test_a_whole_run_makes_the_student_of_the_cpu(environment, student_of_the_cpu, tmp_path, layout):
    python(environment, "-m", "npd_ascend", "run", *RECIPE, f"run.folder={tmp_path}", "device.kind=npu", *layout)
    there = load_file(tmp_path / "student" / "model.safetensors")
    for name, wanted in student_of_the_cpu.items():
        assert (there[name] - wanted).norm() < 1e-4 * wanted.norm(), name
    assert json.loads((tmp_path / "summary.json").read_text())["scores"]["teacher"] == 1


def test_a_group_that_connects_late_is_refused_as_by_hccl(environment):
    """So a run of several ranks shows that every group is warmed up before the first step."""
    code = """
import torch
import torch.distributed as dist
from npd_ascend.device import open_device

one = torch.ones(1, device=open_device("npu", 0))
dist.init_process_group("hccl", store=dist.HashStore(), rank=0, world_size=1)
early, late = dist.new_group([0]), dist.new_group([0])
for _ in range(2):
    dist.all_reduce(one, group=early)
try:
    dist.all_reduce(one, group=late)
except RuntimeError as error:
    print(error)
dist.destroy_process_group()
"""
    assert "error code 7: another group is at work" in python(environment, "-c", code)


def test_what_waits_for_a_card_runs_on_one(environment):
    """tests/npu, as far as there are operators here: whoever has a card should not find the tests' own mistakes."""
    code = """
import bodies
import torch
from npd_ascend.device import open_device
from npd_ascend.model.decoder import PLAIN, Kernels

card = open_device("npu", 0)
for dtype in (torch.float32, torch.bfloat16):
    for rows in (
        bodies.attention(card, dtype, "sdpa"),
        bodies.attention(card, dtype, "npu"),
        bodies.loss(card, dtype, "chunked"),
        bodies.divergence(card, dtype, "chunked", 0.5),
        bodies.layers(card, dtype, "torch"),
        bodies.layers(card, dtype, "npu"),
        bodies.step_gradients(card, dtype, PLAIN, "chunked", "selective"),
        bodies.step_gradients(card, dtype, Kernels("npu", "npu"), "chunked", "selective"),
        bodies.whole_steps(card, dtype, PLAIN, "chunked"),
    ):
        print([row.name for row in rows if not row.passed])
print([row.name for row in bodies.loss(card, torch.bfloat16, "npu") if not row.passed])
"""
    paths = f"{HERE / 'npu'}{os.pathsep}{environment['PYTHONPATH']}"
    with_nnal = environment | {"PYTHONPATH": paths, "ATB_HOME_PATH": "here"}
    assert python(with_nnal, "-c", code).split() == ["[]"] * 19


def test_the_benchmarks_for_a_card_run_on_one(environment, tmp_path, monkeypatch):
    """In the small form of their sizes; what is asked at full size has to fit a card."""
    monkeypatch.syspath_prepend(HERE.parent / "benchmarks")
    mfu = importlib.import_module("mfu")
    (tmp_path / "cann").mkdir()
    (tmp_path / "cann" / "set_env.sh").touch()
    done = subprocess.run(
        ["bash", HERE.parent / "benchmarks" / "npu.sh", "--small"],
        env=environment | {"ASCEND_INSTALL": str(tmp_path), "ATB_HOME_PATH": "here", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    *steps, kernels = map(json.loads, done.stdout.splitlines())
    assert [row["asked"][0] for row in steps] == ["mfu"] * 3
    for row in steps:
        assert row["measured"]["model"] == "tiny"
        assert row["measured"]["step_s"] > 0
        assert row["measured"]["peak_gib"] > 0
        pack_tokens, recompute = row["asked"][6], row["asked"][8]
        asked = argparse.Namespace(device="npu", pack_tokens=int(pack_tokens), recompute=recompute)
        planned = mfu.planned(mfu.SHAPES["1B"], KernelConfig(attention="npu", layer="npu"), asked)
        assert planned < HEADROOM * (ASCEND.memory.value - ASCEND.idle.value), row["asked"]
    cases = [rows for rows in kernels["measured"].values() if isinstance(rows, dict)]
    ran = [[name for name, row in rows.items() if name.startswith("npd") and "ms" in row] for rows in cases]
    assert ran == [["npd sdpa", "npd npu"]] * 2 + [["npd chunked", "npd npu"], ["npd chunked"]]


def test_the_doctor_asks_the_device_and_not_the_host(environment):
    """Sums over tp 2 x dp 2 by ranks with a card each, products and attention."""
    code = """
from npd_ascend.device import open_device
from npd_ascend.doctor.collectives import collective_findings
from npd_ascend.doctor.compute import compute_findings

for finding in collective_findings("npu", 2, 2) + compute_findings(open_device("npu", 0), ["sdpa"]):
    print(finding.check.replace(" ", "_"), finding.status)
"""
    said = dict(line.split() for line in python(environment, "-c", code).splitlines())
    assert list(said.values()) == ["ok"] * 6, said
    assert {"all_reduce_over_tp=2", "all_reduce_over_dp=2", "product,_bfloat16"} <= said.keys()


def test_what_the_kernels_send_each_other_is_on_the_cards(environment, tmp_path):
    code = """
import sys
import torch
import torch.distributed as dist
from npd_ascend.device import collective_backend, open_device
from npd_kernels.dense_divergence import dense_divergence
from npd_kernels.shard import VocabShard
from npd_kernels.token_loss import token_logprobs

rank, device = int(sys.argv[1]), open_device("npu", 0)
dist.init_process_group(collective_backend(device), init_method=f"file://{sys.argv[2]}/store", rank=rank, world_size=2)
torch.manual_seed(0)
hidden, weight, teacher, teacher_weight = (torch.randn(n, 8).to(device) for n in (5, 31, 5, 31))
ids, ones, shard = torch.randint(31, (5, 3)).to(device), torch.ones(5).to(device), VocabShard(0, 31, None)
cut = slice(0, 17) if rank == 0 else slice(17, 31)
mine = VocabShard(cut.start, cut.stop, dist.group.WORLD)
for impl in ("reference", "chunked"):
    whole = dense_divergence(hidden, weight, teacher, teacher_weight, ones, beta=0.5, shard=shard, impl=impl)[1]
    cuts = hidden, weight[cut], teacher, teacher_weight[cut]
    parts = dense_divergence(*cuts, ones, beta=0.5, shard=mine, impl=impl)[1]
    print(float((whole - parts).abs().max()) < 1e-5)
    whole = token_logprobs(hidden, weight, ids, shard=shard, impl=impl)
    print(float((whole - token_logprobs(hidden, weight[cut], ids, shard=mine, impl=impl)).abs().max()) < 1e-5)
try:
    dist.all_reduce(torch.ones(1))
except RuntimeError as error:
    print(str(error).replace(" ", "_"))
dist.destroy_process_group()
"""
    with ThreadPoolExecutor() as threads:
        ranks = threads.map(
            lambda rank: python(environment | {"LOCAL_RANK": str(rank)}, "-c", code, rank, tmp_path), range(2)
        )
    assert [said.split() for said in ranks] == [["True"] * 4 + ["hccl_was_given_a_tensor_of_cpu"]] * 2


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
