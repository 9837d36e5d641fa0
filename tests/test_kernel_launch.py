"""The launch policy: few programs do all the work, and the table has a tile for whatever it promises."""

import ast

import pytest
import torch
from conftest import CONFIGS
from kernel_signatures import ATTENTION, DIVERGENCE, LOSS

from npd_kernels import launch, streaming
from npd_kernels.dense_divergence import dense_divergence
from npd_kernels.packed_attention import packed_attention
from npd_kernels.token_loss import token_loss

CPU = torch.device("cpu")


def attention(generator):
    q, k, v = (torch.randn(70, heads, 16, generator=generator) for heads in (4, 2, 2))
    return packed_attention(q, k, v, [0, 40, 41, 70], 0.25, impl="triton")


def loss(generator):
    hidden, weight = torch.randn(23, 8, generator=generator), torch.randn(99, 8, generator=generator)
    ids, weights = torch.randint(99, (23, 3), generator=generator), torch.rand(23, 3, generator=generator)
    return token_loss(hidden, weight, ids, weights, torch.ones(23), impl="triton")[1]


def divergence(generator):
    hidden, weight, teacher = (torch.randn(n, 8, generator=generator) for n in (23, 99, 99))
    return dense_divergence(hidden, weight, hidden, teacher, torch.ones(23), beta=0.5, impl="triton")[1]


@pytest.mark.parametrize("kernel", [attention, loss, divergence])
def test_fewer_programs_than_pieces_of_work(kernel, monkeypatch):
    """As on an NPU, with one program per core; or with more pieces than a grid may have."""
    wanted = kernel(torch.Generator().manual_seed(0))
    monkeypatch.setattr(launch, "MAX_PROGRAMS", 3)
    assert torch.equal(kernel(torch.Generator().manual_seed(0)), wanted)


def test_a_grid_is_never_larger_than_the_device_takes():
    assert launch.grid(70_000, CPU, matrix=True) == (65_535,)
    assert launch.grid(7, CPU, matrix=False) == (7,)


@pytest.mark.parametrize("device", ["npu", "cuda"])
@pytest.mark.parametrize("kernel", ["forward", "backward_q", "backward_kv"])
def test_every_head_size_up_to_256_has_a_tile_and_larger_ones_are_refused(device, kernel):
    for head_size in range(16, 257, 8):
        for element_size in (2, 4):
            tile = launch.attention_tile(kernel, device, head_size, element_size)
            assert min(tile.rows, tile.cols) >= 16
    with pytest.raises(RuntimeError, match="head size 257; the largest is 256"):
        launch.attention_tile(kernel, device, 257, 2)


def test_every_device_with_tiles_has_a_budget_for_its_chunks():
    assert launch.ATTENTION_TILES.keys() == launch.ROW_TILES.keys() == streaming.CHUNK_BYTES.keys()


def _called(function: ast.FunctionDef) -> set[str]:
    return {
        node.func.id for node in ast.walk(function) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }


def test_every_kernel_that_is_launched_is_among_those_that_are_compiled():
    """For an Ascend 910B and for NVIDIA GPUs, in environments of their own: tests/ascend, tests/cuda."""
    trees = {file: ast.parse(file.read_text()) for file in (CONFIGS.parent / "kernels" / "npd_kernels").rglob("*.py")}
    jitted = {
        (file.parent.name, node.name): node
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list)
    }
    parts = set().union(*map(_called, jitted.values()))
    compiled = {"packed_attention": ATTENTION, "token_loss": LOSS, "dense_divergence": [name for name, _ in DIVERGENCE]}
    launched = {key for key in jitted if key[1] not in parts}
    assert launched == {(operation, name) for operation, names in compiled.items() for name in names}
