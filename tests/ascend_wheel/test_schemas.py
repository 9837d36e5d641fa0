"""Every torch_npu call in the source against the schemas of two wheels: the one that is loaded, and the row's."""

import sys
from pathlib import Path

import pytest
from calls import complaints, listed, operator_calls

ROOT = Path(__file__).parent.parent.parent
FILES = [path for root in ("npd_ascend", "kernels") for path in sorted((ROOT / root).rglob("*.py"))]
ON_A_CARD = [path for root in ("tests/npu", "benchmarks") for path in sorted((ROOT / root).rglob("*.py"))]


def test_every_call_fits_its_schema():
    for path in (*FILES, *ON_A_CARD):
        assert complaints(path.read_text()) == [], path
    called = {name for path in FILES for name, _ in operator_calls(path.read_text())}
    assert called == {"npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul", "npu_swiglu", "_npu_matmul_add_fp32"}


@pytest.fixture(scope="module")
def of_the_row():
    """torch_npu as requirements-npu.txt wants it, beside the one that is loaded; with --row they are the same."""
    package = Path(sys.prefix) / "row" / "torch_npu"
    if not package.exists():
        pytest.skip("the row's torch-npu is not there; bash launch/npu_proof.sh fetches it")
    return listed(package)


def test_every_call_fits_the_version_of_the_row(of_the_row):
    for path in (*FILES, *ON_A_CARD):
        assert complaints(path.read_text(), of_the_row) == [], path


def test_an_argument_that_the_row_does_not_have_is_found(of_the_row):
    assert "has no argument sink" in complaints("torch_npu.npu_rms_norm(x, weight, sink=1)", of_the_row)[0]
    assert "no operator npu_rms_norms" in complaints("torch_npu.npu_rms_norms(x, weight)", of_the_row)[0]
    assert "has no argument out" in complaints("torch_npu._npu_matmul_add_fp32(x, w, c, out=c)", of_the_row)[0]


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("torch_npu.npu_fused_attention(q, k, v)", "no operator npu_fused_attention"),
        ("torch.ops.npu.npu_swish_glu(x)", "no operator npu_swish_glu"),
        ("torch_npu.npu_rms_norm(x, weight, eps=1e-6)", "has no argument eps"),
        ("torch_npu.npu_rms_norm(self=x, gamma=weight)", "has no argument self"),
        ("torch_npu.npu_fusion_attention(q, k, v, 8, 'TND', attn_mask=mask)", "has no argument attn_mask"),
        ("torch_npu.npu_fusion_attention(q, k, v, input_layout='TND')", "needs head_num"),
        ("torch_npu.npu_swiglu(x, -1, True)", "takes 2 positional arguments, got 3"),
        ("torch_npu.npu_swiglu(x, -1, dim=-1)", "gets dim twice"),
        ("torch_npu._npu_matmul_add_fp32(x, weight)", "needs C"),
        ("torch_npu._npu_matmul_add_fp32(x, weight, out=total)", "has no argument out"),
        ("torch_npu.npu_swiglu(x, **how)", "must be written out"),
        ("from torch_npu import npu_swiglu", "write `import torch_npu`"),
        ("import torch_npu as fused", "write `import torch_npu`"),
    ],
)
def test_planted_mistakes_are_found(mistake, said):
    (complaint,) = complaints(mistake)
    assert said in complaint


def test_right_calls_are_not_found():
    assert complaints("torch_npu.npu_rms_norm(x, weight, epsilon=1e-6)") == []
    assert complaints("torch.ops.npu.npu_swiglu.default(x, dim=-1)") == []
