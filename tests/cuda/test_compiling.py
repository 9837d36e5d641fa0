"""Every Triton kernel at its launch sizes, compiled for NVIDIA GPUs: on-chip memory and registers suffice."""

import pytest
from compiling import compile_for
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

from npd_kernels.dense_divergence import triton_kernels as divergence_kernels
from npd_kernels.launch import ROW_TILES, Tile, attention_tile
from npd_kernels.packed_attention import triton_kernels as attention_kernels
from npd_kernels.packed_attention.impl_triton import constants
from npd_kernels.token_loss import triton_kernels as loss_kernels

# compute capability -> shared memory of one program (CUDA programming guide)
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
SPILLED_BYTES = 64  # a few registers of a long prologue; the loops of the ones that spill more would suffer
TILES = ROW_TILES["cuda"]


def assert_fits(compiled, capability):
    assert compiled.shared_bytes <= SHARED_BYTES[capability], compiled
    assert compiled.spilled_bytes <= SPILLED_BYTES, compiled


@pytest.mark.parametrize("capability", list(SHARED_BYTES))
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("shape", ["openPangu-1B", "head 64", "head 256"])
@pytest.mark.parametrize("kernel", ATTENTION)
def test_attention_fits(kernel, shape, dtype, capability):
    tile = attention_tile(kernel, "cuda", SHAPES[shape][2], 4 if dtype == "fp32" else 2)
    sizes = constants(*SHAPES[shape], tile)
    arguments = attention_arguments(kernel, dtype)
    assert_fits(compile_for(getattr(attention_kernels, kernel), arguments, sizes, tile.options, capability), capability)


@pytest.mark.parametrize("capability", list(SHARED_BYTES))
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("slots", [1, 11, 65])
@pytest.mark.parametrize("kernel", LOSS)
def test_token_loss_fits(kernel, slots, dtype, capability):
    tile = TILES["token_loss"]
    sizes, arguments = loss_constants(kernel, slots, tile.cols), loss_arguments(kernel, dtype)
    assert_fits(compile_for(getattr(loss_kernels, kernel), arguments, sizes, tile.options, capability), capability)


@pytest.mark.parametrize("capability", list(SHARED_BYTES))
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("kernel", "kind"), DIVERGENCE)
def test_dense_divergence_fits(kernel, kind, dtype, capability):
    sizes, arguments = divergence_constants(kind, TILES), divergence_arguments(kernel, dtype)
    options = TILES["logsumexp" if kind is None else "divergence"].options
    assert_fits(compile_for(getattr(divergence_kernels, kernel), arguments, sizes, options, capability), capability)


def test_what_does_not_fit_is_seen():
    shape, arguments = SHAPES["openPangu-1B"], attention_arguments("backward_kv", "bf16")
    tight = Tile(64, 128, warps=4, stages=2)
    kernel = attention_kernels.backward_kv
    assert compile_for(kernel, arguments, constants(*shape, tight), tight.options, 80).spilled_bytes > SPILLED_BYTES
    deep = Tile(128, 128, warps=8, stages=4)
    kernel, arguments = attention_kernels.forward, attention_arguments("forward", "bf16")
    assert compile_for(kernel, arguments, constants(*shape, deep), deep.options, 80).shared_bytes > SHARED_BYTES[80]
