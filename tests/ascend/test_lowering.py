"""Every Triton kernel at the sizes it is launched with, lowered for Ascend 910B; in an environment of its own."""

import pytest
from kernel_signatures import (
    ATTENTION,
    DIVERGENCE,
    LOSS,
    SHAPES,
    attention_arguments,
    divergence_arguments,
    divergence_constants,
    loss_arguments,
    loss_constants,
)
from lowering import lower

from npd_kernels.dense_divergence import triton_kernels as divergence_kernels
from npd_kernels.launch import ROW_TILES, Tile, attention_tile
from npd_kernels.packed_attention import triton_kernels as attention_kernels
from npd_kernels.packed_attention.impl_triton import constants
from npd_kernels.token_loss import triton_kernels as loss_kernels

CHIPS = ["Ascend910B1", "Ascend910B3"]
TILES = ROW_TILES["npu"]


# both chips have the same memory on a core, so one case each shows that the other takes the kernels too
CASES = [("Ascend910B1", dtype, shape) for dtype in ("bf16", "fp32") for shape in SHAPES]
CASES += [("Ascend910B3", "bf16", "openPangu-1B"), ("Ascend910B1", "fp16", "openPangu-1B")]


@pytest.mark.parametrize(("chip", "dtype", "shape"), CASES)
@pytest.mark.parametrize("kernel", ATTENTION)
def test_attention_fits_the_chip(kernel, shape, dtype, chip):
    tile = attention_tile(kernel, "npu", SHAPES[shape][2], 4 if dtype == "fp32" else 2)
    sizes = constants(*SHAPES[shape], tile)
    lowered = lower(getattr(attention_kernels, kernel), attention_arguments(kernel, dtype), sizes, chip)
    assert lowered.fits, lowered.said


@pytest.mark.parametrize(
    ("chip", "dtype", "slots"),
    [(CHIPS[0], dtype, slots) for dtype in ("bf16", "fp32") for slots in (1, 11, 65)] + [(CHIPS[1], "bf16", 11)],
)
@pytest.mark.parametrize("kernel", LOSS)
def test_token_loss_fits_the_chip(kernel, slots, dtype, chip):
    sizes = loss_constants(kernel, slots, TILES["token_loss"].cols)
    lowered = lower(getattr(loss_kernels, kernel), loss_arguments(kernel, dtype), sizes, chip)
    assert lowered.fits, lowered.said


@pytest.mark.parametrize(
    ("kernel", "kind", "dtype", "chip"),
    [(*kernel, dtype, CHIPS[0]) for kernel in DIVERGENCE for dtype in ("bf16", "fp32")]
    + [(*DIVERGENCE[-1], "bf16", CHIPS[1])],
)
def test_dense_divergence_fits_the_chip(kernel, kind, dtype, chip):
    sizes = divergence_constants(kind, TILES)
    lowered = lower(getattr(divergence_kernels, kernel), divergence_arguments(kernel, dtype), sizes, chip)
    assert lowered.fits, lowered.said


def test_what_does_not_fit_is_seen():
    too_large = constants(*SHAPES["openPangu-1B"], Tile(128, 128))
    lowered = lower(attention_kernels.forward, attention_arguments("forward", "bf16"), too_large, CHIPS[0])
    assert not lowered.fits
    assert "overflow" in lowered.said
    too_wide = loss_constants("gradient", 11, 65536)
    assert not lower(loss_kernels.gradient, loss_arguments("gradient", "bf16"), too_wide, CHIPS[0]).fits
