"""The bodies of tests/npu, run on CPU: they pass for what is right and see planted mistakes."""

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


@DTYPES
@pytest.mark.parametrize("body", BODIES)
def test_right_code_passes(body, dtype):
    assert [row for row in BODIES[body](dtype) if not row.passed] == []


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
