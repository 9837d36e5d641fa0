"""Every Triton kernel at the sizes it is launched with, lowered for Ascend 910B; in an environment of its own."""

import pytest
from lowering import lower

from npd_kernels.dense_divergence import impl_triton as divergence
from npd_kernels.dense_divergence import triton_kernels as divergence_kernels
from npd_kernels.packed_attention import impl_triton as attention
from npd_kernels.packed_attention import triton_kernels as attention_kernels
from npd_kernels.token_loss import impl_triton as loss
from npd_kernels.token_loss import triton_kernels as loss_kernels

CHIPS = ["Ascend910B1", "Ascend910B3"]
# query heads, key heads, head size
SHAPES = {"openPangu-1B": (12, 6, 128), "openPangu-7B": (32, 8, 128), "head 64": (4, 2, 64), "head 256": (4, 1, 256)}


def attention_arguments(kernel, dtype):
    tensors = {
        "forward": ["q", "k", "v", "out", "lse"],
        "backward_q": ["q", "k", "v", "out", "d_out", "lse", "delta", "d_q"],
        "backward_kv": ["q", "k", "v", "d_out", "lse", "delta", "d_k", "d_v"],
    }[kernel]
    types = {name: "*fp32" if name in ("lse", "delta") else f"*{dtype}" for name in tensors}
    return types | {"tiles": "*i32", "items": "i32", "scale": "fp32"}


def attention_constants(shape, blocks):
    heads, groups, size = shape
    return {"N": heads, "G": groups, "H": size, "P": size, "M": blocks[0], "C": blocks[1], "UPCAST": False}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("kernel", ["forward", "backward_q", "backward_kv"])
def test_attention_fits_the_chip(kernel, shape, dtype, chip):
    constants = attention_constants(SHAPES[shape], attention.blocks(SHAPES[shape][2], dtype == "fp32"))
    lowered = lower(getattr(attention_kernels, kernel), attention_arguments(kernel, dtype), constants, chip)
    assert lowered.fits, lowered.said


def loss_arguments(kernel, dtype):
    common = {"logits": f"*{dtype}", "ids": "*i32", "lse": "*fp32"}
    own = {"lse_and_targets": {"targets": "*fp32"}, "gradient": {"sums": "*fp32", "weights": "*fp32"}}[kernel]
    return common | own | {"rows": "i32", "valid": "i32", "width": "i32"}


def loss_constants(kernel, slots, block):
    constants = {"K": slots, "BLOCK": block}
    return constants | ({"SLOTS": 1 << (slots - 1).bit_length()} if kernel == "lse_and_targets" else {})


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("slots", [1, 11, 65])
@pytest.mark.parametrize("kernel", ["lse_and_targets", "gradient"])
def test_token_loss_fits_the_chip(kernel, slots, dtype, chip):
    constants = loss_constants(kernel, slots, loss.BLOCK)
    lowered = lower(getattr(loss_kernels, kernel), loss_arguments(kernel, dtype), constants, chip)
    assert lowered.fits, lowered.said


def divergence_arguments(kernel, dtype):
    rows = {"rows": "i32", "valid": "i32", "width": "i32"}
    if kernel == "logsumexp":
        return {"logits": f"*{dtype}", "tops": "*fp32", "rests": "*fp32"} | rows
    logits = {"student": f"*{dtype}", "teacher": f"*{dtype}"}
    statistics = ["student_top", "teacher_top", "student_rest", "teacher_rest"]
    statistics += {"terms": ["teacher_kl", "student_kl"], "gradient": ["student_kl", "scale"]}[kernel]
    return logits | dict.fromkeys(statistics, "*fp32") | rows | {"log_beta": "fp32", "log_rest": "fp32"}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("kernel", "kind"), [("logsumexp", None)] + [(k, i) for k in ("terms", "gradient") for i in range(3)]
)
def test_dense_divergence_fits_the_chip(kernel, kind, dtype, chip):
    constants = {"BLOCK": 2 * divergence.BLOCK} if kind is None else {"KIND": kind, "BLOCK": divergence.BLOCK}
    lowered = lower(getattr(divergence_kernels, kernel), divergence_arguments(kernel, dtype), constants, chip)
    assert lowered.fits, lowered.said


def test_what_does_not_fit_is_seen():
    too_large = attention_constants(SHAPES["openPangu-1B"], (128, 128))
    lowered = lower(attention_kernels.forward, attention_arguments("forward", "bf16"), too_large, CHIPS[0])
    assert not lowered.fits
    assert "overflow" in lowered.said
    too_wide = loss_constants("gradient", 11, 65536)
    assert not lower(loss_kernels.gradient, loss_arguments("gradient", "bf16"), too_wide, CHIPS[0]).fits
