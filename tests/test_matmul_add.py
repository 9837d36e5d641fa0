"""kernels.loss npu and mindspeed: our side of an operator that only an NPU has, and who is refused.

The operator's place is taken by its documented formula: C += x^T weight with float32 sums (op-plugin 517f2e7d,
test/test_custom_ops/test_atb_linear.py; MindSpeed core_r0.16.0, docs/zh/ops/npu_matmul_add.md).
"""

import ast
import importlib.util
import inspect
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import CONFIGS
from test_token_loss import _inputs, _plain, _run, _several_chunks, _worst  # noqa: F401

from npd_ascend.config import KernelConfig, load_config
from npd_ascend.errors import UserError
from npd_ascend.model.load import choose_kernels
from npd_kernels.token_loss import impl_chunked, impl_mindspeed, impl_npu, reference, streamed, token_loss

BOTH = pytest.mark.parametrize("impl", [impl_npu, impl_mindspeed], ids=["npu", "mindspeed"])
CPU = torch.device("cpu")
NPU = SimpleNamespace(type="npu")  # plain torch knows no such device
# of mindspeed.ops.npu_matmul_add.npu_matmul_add_fp32 in Ascend/MindSpeed, branch core_r0.16.0 (e477249)
SIGNATURE = ["total_input", "grad_output", "grad"]


@pytest.fixture
def operator(monkeypatch):
    """Both packages, with the formula for the operator; append to `calls` what it was given."""
    calls = []

    def torch_npu_form(x, weight, total):
        calls.append((x, weight, total))
        total += x.float().T @ weight.float()

    def mindspeed_form(total_input, grad_output, grad):
        torch_npu_form(grad_output, total_input, grad)

    torch_npu = ModuleType("torch_npu")
    torch_npu._npu_matmul_add_fp32 = torch_npu_form
    module = ModuleType("mindspeed.ops.npu_matmul_add")
    module.npu_matmul_add_fp32 = mindspeed_form
    for name, value in (("torch_npu", torch_npu), (module.__name__, module)):
        monkeypatch.setitem(sys.modules, name, value)
    monkeypatch.setitem(sys.modules, "mindspeed.ops", ModuleType("mindspeed.ops"))
    monkeypatch.setitem(sys.modules, "mindspeed", ModuleType("mindspeed"))
    return calls


@BOTH
def test_a_float32_sum_of_bfloat16_products_is_nearer_to_float64_than_plain_code(impl, operator):
    inputs = _inputs(dtype=torch.bfloat16)
    truth = _run(reference.token_loss, [x.double() if x.is_floating_point() else x for x in inputs])
    plain = _worst(_run(_plain, inputs), truth)
    fused = _worst(_run(impl.token_loss, inputs), truth)
    for name, got, have in zip(("sum", "loss", "d_hidden", "d_weight"), fused, plain, strict=True):
        assert got <= 1.2 * have, name
    # every chunk: gradients of logits, hidden states, the sum
    assert [[*map(tuple, map(torch.Tensor.size, call))] for call in operator] == [
        [(tokens, 251), (tokens, 29), (251, 29)] for tokens in (16, 16, 16, 16, 3)
    ]
    chunked = _worst(_run(partial(token_loss, impl="chunked"), inputs), truth)
    assert fused[3] <= chunked[3]


def _lost(module):
    return lambda total, d_logits, hidden: module._npu_matmul_add_fp32(d_logits, hidden, total.clone())


def _twice(module):
    def add(total, d_logits, hidden):
        for _ in range(2):
            module._npu_matmul_add_fp32(d_logits, hidden, total)

    return add


@pytest.mark.parametrize("mistake", [_lost, _twice])
def test_planted_mistakes_are_seen(mistake, operator):
    inputs = _inputs(dtype=torch.bfloat16)
    truth = _run(reference.token_loss, [x.double() if x.is_floating_point() else x for x in inputs])
    bar = 1.2 * _worst(_run(_plain, inputs), truth)[3]
    mistaken = partial(streamed.token_loss, impl_chunked.Rows, add_product=mistake(sys.modules["torch_npu"]))
    assert _worst(_run(mistaken, inputs), truth)[3] > 10 * bar


@BOTH
def test_log_probs_have_the_same_gradient(impl, operator):
    hidden, weight, ids, upstream, _ = _inputs(dtype=torch.bfloat16)
    grads = []
    for fn in (impl.token_logprobs, impl_chunked.token_logprobs):
        leaf = weight.clone().requires_grad_()
        grads += torch.autograd.grad((fn(hidden, leaf, ids) * upstream).sum(), leaf)
    assert operator
    assert (grads[0] - grads[1]).float().norm() < 0.01 * grads[1].float().norm()


@BOTH
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c, x, h: (c, x.float(), h.float()), "Use kernels.loss: chunked"),
        (lambda c, x, h: (c, x.half(), h), "Use kernels.loss: chunked"),
        (lambda c, x, h: (c.bfloat16(), x, h), "Use kernels.loss: chunked"),
        (lambda c, x, h: (c.T.contiguous(), x, h), "do not add to a contiguous sum"),
        (lambda c, x, h: (c.T.contiguous().T, x, h), "do not add to a contiguous sum"),
        (lambda c, x, h: (c, x, h[:2]), "do not add to a contiguous sum"),
    ],
)
def test_what_the_operator_would_take_and_should_not_is_refused(impl, change, said, operator):
    tensors = torch.zeros(5, 3), torch.zeros(4, 5, dtype=torch.bfloat16), torch.zeros(4, 3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=said):
        impl.add_product(*change(*tensors))
    assert operator == []
    impl.add_product(*tensors)


def test_who_lacks_something_is_told_what(monkeypatch):
    present = {"torch_npu"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in present else None)
    monkeypatch.setattr(impl_mindspeed.shutil, "which", lambda name: None if name == "ninja" else name)
    for name in ("ATB_HOME_PATH", "ASCEND_HOME_PATH"):
        monkeypatch.delenv(name, raising=False)
    for impl in (impl_npu, impl_mindspeed):
        assert "needs an Ascend NPU" in impl.unavailable_reason(CPU)
        assert impl.unavailable_reason(NPU) == "ATB_HOME_PATH is not set; source nnal's set_env.sh"
    monkeypatch.setenv("ATB_HOME_PATH", "/atb")
    assert impl_npu.unavailable_reason(NPU) is None
    assert impl_mindspeed.unavailable_reason(NPU).startswith("the mindspeed package is not installed")
    with pytest.raises(
        UserError, match=r"kernels.loss: mindspeed cannot run here: the mindspeed package .*choose anot"
    ):
        choose_kernels(KernelConfig(loss="mindspeed"), NPU)
    present.add("mindspeed")
    assert impl_mindspeed.unavailable_reason(NPU).startswith("ASCEND_HOME_PATH is not set")
    monkeypatch.setenv("ASCEND_HOME_PATH", "/cann")
    assert "ninja is not on the PATH" in impl_mindspeed.unavailable_reason(NPU)
    monkeypatch.setattr(impl_mindspeed.shutil, "which", lambda name: name)
    assert impl_mindspeed.unavailable_reason(NPU) is None


@pytest.mark.parametrize("name", ["npu", "mindspeed"])
def test_a_float32_student_is_refused_when_the_configuration_is_read(name):
    with pytest.raises(UserError, match=f"kernels.loss={name} adds products of bfloat16 to float32 sums, .*chunked"):
        load_config(CONFIGS / "addition_cpu.yaml", [f"kernels.loss={name}"])
    load_config(CONFIGS / "addition_cpu.yaml", [f"kernels.loss={name}", "student.dtype=bfloat16"])


def _calls_of_mindspeed(source: str) -> list[list[str | None]]:
    """Argument names of every call of what `source` imports from mindspeed; None for one by position."""
    tree = ast.parse(source)
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = {a.name for node in imported if (node.module or "").startswith("mindspeed") for a in node.names}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in names]
    return [[None] * len(call.args) + [keyword.arg for keyword in call.keywords] for call in calls]


def test_every_call_of_mindspeed_names_the_arguments_that_its_source_has():
    root = CONFIGS.parent
    files = [path for folder in ("npd_ascend", "kernels") for path in (root / folder).rglob("*.py")]
    using = {path.name: calls for path in files if (calls := _calls_of_mindspeed(path.read_text()))}
    assert using == {"impl_mindspeed.py": [SIGNATURE]}
    wrong = Path(impl_mindspeed.__file__).read_text().replace("grad_output=", "d_output=")
    assert _calls_of_mindspeed(wrong) != [SIGNATURE]


def test_the_signature_is_that_of_an_installed_mindspeed():
    """Read and not imported: that would bring torch_npu."""
    found = importlib.util.find_spec("mindspeed")
    if found is None:
        pytest.skip("mindspeed is not installed")
    source = Path(found.submodule_search_locations[0], "ops", "npu_matmul_add.py").read_text()
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    assert [a.arg for a in functions["npu_matmul_add_fp32"].args.args] == SIGNATURE


def test_the_stand_in_has_that_signature_too(operator):
    form = sys.modules["mindspeed.ops.npu_matmul_add"].npu_matmul_add_fp32
    assert list(inspect.signature(form).parameters) == SIGNATURE
