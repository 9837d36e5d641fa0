"""The bodies of tests/npu, run on CPU: they pass for what is right and see planted mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "npu"))
import bodies
from bodies import CPU

from npd_ascend.model.decoder import PLAIN
from npd_kernels import layer_ops
from npd_kernels.dense_divergence import impl_chunked as chunked_divergence
from npd_kernels.layer_ops import impl_torch
from npd_kernels.packed_attention import impl_sdpa
from npd_kernels.token_loss import impl_chunked

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
BODIES = {
    "attention": lambda dtype: bodies.attention(CPU, dtype, "sdpa"),
    "loss": lambda dtype: bodies.loss(CPU, dtype, "chunked"),
    "divergence": lambda dtype: bodies.divergence(CPU, dtype, "chunked", 0.5),
    "layers": lambda dtype: bodies.layers(CPU, dtype, "torch"),
    "gradients": lambda dtype: bodies.step_gradients(CPU, dtype, PLAIN, "chunked", "selective"),
    "updates": lambda dtype: bodies.whole_steps(CPU, dtype, PLAIN, "chunked"),
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors are small, and threads that wait for each other cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@DTYPES
@pytest.mark.parametrize("body", BODIES)
def test_right_code_passes(body, dtype):
    assert [row for row in BODIES[body](dtype) if not row.passed] == []


def test_ranks_train_the_student_of_one_and_another_learning_rate_does_not(tmp_path):
    two = ["parallel.tp=2", "parallel.sequence_parallel=true"]
    assert [row for row in bodies.ranks(two, tmp_path / "right") if not row.passed] == []
    assert not all(row.passed for row in bodies.ranks(["sft.optimizer.lr=3.3e-3"], tmp_path / "wrong"))


class _Mistaken:
    """An implementation beside the right one, under a name of its own, so that the bar stays where it is."""

    def __init__(self, module, **mistakes):
        self.__dict__ |= {name: getattr(module, name) for name in dir(module)} | mistakes


def _scaled(fn, factor):
    return lambda *args: tuple(factor * x for x in out) if isinstance(out := fn(*args), tuple) else factor * out


def _off_by_one(q, k, v, cu, scale):
    return impl_sdpa.packed_attention(q, k, v, [*cu[:3], cu[3] + 1, *cu[4:]], scale)


def _wrong_way_round(x, cos, sin):
    return impl_torch.rotate(x, cos, -sin)


@DTYPES
def test_planted_mistakes_are_seen(dtype, monkeypatch):
    planted = {
        bodies.attention_operation: _Mistaken(impl_sdpa, packed_attention=_off_by_one),
        bodies.loss_operation: _Mistaken(impl_chunked, token_loss=_scaled(impl_chunked.token_loss, 1.1)),
        bodies.divergence_operation: _Mistaken(
            chunked_divergence, dense_divergence=_scaled(chunked_divergence.dense_divergence, 1.1)
        ),
        layer_ops: _Mistaken(impl_torch, rotate=_wrong_way_round),
    }
    for operation, mistaken in planted.items():
        monkeypatch.setitem(operation.IMPLEMENTATIONS, "mistaken", mistaken)
    for rows, name in (
        (bodies.attention(CPU, dtype, "mistaken"), "d_v"),
        (bodies.loss(CPU, dtype, "mistaken"), "d_weight"),
        (bodies.divergence(CPU, dtype, "mistaken", 0.5), "d_hidden"),
        (bodies.layers(CPU, dtype, "mistaken"), "rotary"),
        (
            bodies.step_gradients(CPU, dtype, bodies.Kernels("sdpa", "mistaken"), "chunked"),
            "layers.0.attention.qkv.weight",
        ),
        (
            bodies.step_gradients(CPU, dtype, bodies.Kernels("mistaken", "torch"), "chunked"),
            "layers.0.attention.qkv.weight",
        ),
    ):
        assert name in {row.name for row in rows if not row.passed}


_FAKE_CARD = """
import torch
import npd_ascend.device, npd_ascend.doctor.device
npd_ascend.device.open_device = lambda kind, threads: torch.device("cpu")
npd_ascend.doctor.device.run_npu_smi = lambda: (
    "| npu-smi 1.0  Version: 1.0 |\\n| 0 910B2 | OK | 1 2 0 / 0 |\\n| 0 | 0000:C1:00.0 | 0 0 / 0 1 / 65536 |"
)
"""


def test_the_file_to_send_back_says_what_passed_and_what_did_not(tmp_path):
    """With a CPU in a card's place: plain operators pass, fused ones say why they cannot run."""
    (tmp_path / "fake_card.py").write_text(_FAKE_CARD)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "NPD_NPU_RESULTS": str(tmp_path / "results.json"),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    }
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-p", "fake_card", "-p", "no:cacheprovider", "--confcutdir=tests/npu"]
    done = subprocess.run([*command, "tests/npu", "-k", "layers and float32"], cwd=root, env=environment, text=True)
    assert done.returncode == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["card"], results["driver"], results["versions"]["torch"]) == ("910B2", "1.0", torch.__version__)
    plain, fused = results["tests"]["test_layers[torch-float32]"], results["tests"]["test_layers[npu-float32]"]
    assert plain["passed"]
    assert set(plain["errors"]["rotary"]) == {"error", "allowed"}
    assert not fused["passed"]
    assert "needs an Ascend NPU, and the tensors are on cpu" in fused["raised"]


def test_without_a_card_they_are_skipped_with_the_reason():
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "--confcutdir=tests/npu", "tests/npu"]
    root = Path(__file__).parent.parent
    said = subprocess.run([*command, "-k", "layers"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert "no NPU here (npu-smi not found)" in said
    assert "4 skipped" in said
