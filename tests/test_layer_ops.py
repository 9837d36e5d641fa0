"""The small operators: their definitions in float64, and who is refused."""

import pytest
import torch

from npd_kernels.layer_ops import impl_npu, rms_norm, rotary_tables, rotate, swiglu


def _random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_rms_norm():
    x, weight = _random(7, 24), _random(24)
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert (rms_norm(x, weight, 1e-5, impl="torch") - want).abs().max() < 1e-6
    assert (rms_norm(x, weight, 1e-1, impl="torch") - want).abs().max() > 1e-2  # eps is not lost


def test_rotate():
    x_TNH, angle_Th = _random(7, 3, 8), 3 * _random(7, 4)
    x1, x2 = x_TNH.double().split(4, -1)
    cos, sin = angle_Th.double().cos()[:, None], angle_Th.double().sin()[:, None]
    want = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)
    tables = rotary_tables(angle_Th.repeat(1, 2), torch.float32, impl="torch")
    assert (rotate(x_TNH, tables, impl="torch") - want).abs().max() < 1e-6
    backwards = rotary_tables(-angle_Th.repeat(1, 2), torch.float32, impl="torch")
    assert (rotate(x_TNH, backwards, impl="torch") - want).abs().max() > 1e-2


def test_swiglu():
    gate_up = _random(7, 10)
    gate, up = gate_up.double().chunk(2, -1)
    assert (swiglu(gate_up, impl="torch") - gate * gate.sigmoid() * up).abs().max() < 1e-6
    assert (swiglu(gate_up.roll(5, -1), impl="torch") - gate * gate.sigmoid() * up).abs().max() > 1e-2


@pytest.mark.parametrize(("heads", "size", "said"), [(2, 63, "got 63"), (2, 896, "got 896"), (1000, 64, "got 1000")])
def test_shapes_that_npu_rotary_mul_does_not_take_are_refused(heads, size, said):
    with pytest.raises(ValueError, match=said):
        impl_npu.check_rotary(torch.empty(3, heads, size, device="meta"))
    impl_npu.check_rotary(torch.empty(3, 999, 894, device="meta"))


def test_an_npu_operator_on_cpu_is_refused_with_the_reason():
    with pytest.raises(RuntimeError, match="needs an Ascend NPU, and the tensors are on cpu"):
        swiglu(_random(2, 4), impl="npu")
    with pytest.raises(ValueError, match="choose one of torch, npu"):
        swiglu(_random(2, 4), impl="liger")
