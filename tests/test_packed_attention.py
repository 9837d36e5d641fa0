"""Packed attention: every implementation against float64, judged by plain code's own error."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npd_kernels.launch import Tile
from npd_kernels.packed_attention import impl_npu, impl_triton, packed_attention, reference

LENGTHS = [1, 17, 17, 64, 3, 3, 3, 29]
CU = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]


def _inputs(num_tokens, heads=(4, 2), head_dim=32, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num_tokens, n, head_dim, generator=generator).to(dtype) for n in (heads[0], heads[1], heads[1])]


def _gradients(fn, inputs, upstream):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = fn(*leaves)
    return [out.detach(), *torch.autograd.grad((out.double() * upstream).sum(), leaves)]


def _plain(q, k, v, cu):
    """Ordinary code in the inputs' dtype, one sample after another."""
    outs = []
    for a, b in itertools.pairwise(cu):
        ks, vs = (x[a:b].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("tnh,snh->nts", q[a:b], ks) * q.shape[2] ** -0.5
        mask = torch.ones(b - a, b - a, dtype=torch.bool).triu(1)
        outs.append(torch.einsum("nts,snh->tnh", scores.masked_fill(mask, float("-inf")).softmax(-1), vs))
    return torch.cat(outs)


_CASES = [
    *((impl, torch.float32, heads) for impl in ("sdpa", "triton") for heads in [(4, 4), (4, 2), (6, 1)]),
    *(("sdpa", torch.bfloat16, heads) for heads in [(4, 4), (4, 2), (6, 1)]),
    ("sdpa", torch.float16, (4, 2)),
    # the interpreter computes these in float32, and slowly
    *(("triton", dtype, (4, 2)) for dtype in (torch.bfloat16, torch.float16)),
]


@pytest.mark.parametrize(("impl", "dtype", "heads"), _CASES, ids=str)
def test_no_worse_than_plain_code(impl, dtype, heads):
    inputs = _inputs(CU[-1], heads, dtype=dtype)
    upstream = torch.randn(CU[-1], heads[0], 32, generator=torch.Generator().manual_seed(9)).double()
    truth = _gradients(
        lambda q, k, v: reference.packed_attention(q, k, v, CU, 32**-0.5), [x.double() for x in inputs], upstream
    )
    plain = _gradients(lambda q, k, v: _plain(q, k, v, CU), inputs, upstream)
    fused = _gradients(lambda q, k, v: packed_attention(q, k, v, CU, 32**-0.5, impl=impl), inputs, upstream)
    wrong = [*CU[:3], CU[3] + 1, *CU[4:]]  # planted mistake: one seam off by one
    off = _gradients(lambda q, k, v: packed_attention(q, k, v, wrong, 32**-0.5, impl=impl), inputs, upstream)
    for want, have, got, bad in zip(truth, plain, fused, off, strict=True):
        floor = 4 * torch.finfo(dtype).eps * want.abs().max()
        expected = max((have - want).abs().max(), floor)
        assert (got - want).abs().max() <= 1.2 * expected
        assert (bad - want).abs().max() > 10 * (got - want).abs().max()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(0, 99))
def test_any_lengths(lengths, seed):
    cu = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    q, k, v = _inputs(cu[-1], seed=seed)
    want = reference.packed_attention(q, k, v, cu, 0.2)
    assert (packed_attention(q, k, v, cu, 0.2, impl="sdpa") - want).abs().max() <= 2e-6


@pytest.mark.parametrize(
    ("lengths", "head_dim"),
    [([1], 32), ([16], 32), ([15, 1, 17, 33], 64), ([1] * 40, 24), ([5, 48, 2], 128)],
    ids=str,
)
@pytest.mark.parametrize("block", [(16, 16), (32, 16), (16, 32)], ids=str)
def test_triton_at_the_edges_of_its_blocks(lengths, head_dim, block, monkeypatch):
    """Lengths around its blocks, square, tall and wide; one-token samples; a head size that is no power of two."""
    monkeypatch.setattr(impl_triton, "attention_tile", lambda *_: Tile(*block))
    cu = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    inputs = _inputs(cu[-1], (2, 1), head_dim)
    upstream = torch.randn(cu[-1], 2, head_dim, generator=torch.Generator().manual_seed(9)).double()
    truth = _gradients(
        lambda *x: reference.packed_attention(*x, cu, head_dim**-0.5), [x.double() for x in inputs], upstream
    )
    got = _gradients(lambda *x: packed_attention(*x, cu, head_dim**-0.5, impl="triton"), inputs, upstream)
    again = _gradients(lambda *x: packed_attention(*x, cu, head_dim**-0.5, impl="triton"), inputs, upstream)
    for want, have, repeated in zip(truth, got, again, strict=True):
        assert (have - want).abs().max() <= 2e-6 * max(1.0, float(want.abs().max()))
        assert torch.equal(have, repeated)


@pytest.mark.parametrize("impl", ["sdpa", "triton"])
def test_1024_samples(impl):
    """As many as the NPU's operator takes, of one token and of two."""
    cu = [0, *(1 + torch.arange(1024) % 2).cumsum(0).tolist()]
    inputs = _inputs(cu[-1], (1, 1), 8)
    got = packed_attention(*inputs, cu, 0.3, impl=impl)
    assert (got - reference.packed_attention(*inputs, cu, 0.3)).abs().max() <= 2e-6


@pytest.mark.parametrize("tiles", [impl_triton.query_tiles, impl_triton.key_tiles])
def test_tiles_cover_every_row_once_and_the_longest_come_first(tiles):
    rows, work = [], []
    for first, begin, end in tiles(CU, 16).tolist():
        last = min(first + 16, end)
        rows += range(first, last)
        work.append(first - begin if tiles is impl_triton.query_tiles else end - first)
    assert sorted(rows) == list(range(CU[-1]))
    assert work == sorted(work, reverse=True)


def test_the_reference_has_the_right_gradient():
    inputs = [x.double().requires_grad_() for x in _inputs(9, (2, 1), 4)]
    assert torch.autograd.gradcheck(lambda *x: reference.packed_attention(*x, [0, 4, 5, 9], 0.5), inputs)


@pytest.mark.parametrize(
    ("cu", "said"), [([0, 5], "T=6"), ([0, 3, 3, 6], "strictly"), ([1, 6], "from 0"), ([0, 4, 2, 6], "strictly")]
)
def test_offsets_that_do_not_fit_are_refused(cu, said):
    with pytest.raises(ValueError, match=said):
        packed_attention(*_inputs(6), cu, 1.0, impl="sdpa")


def test_more_samples_than_the_npu_operator_takes_are_several_calls(monkeypatch):
    def attend(q_TNH, k_TGH, v_TGH, ends, scale):
        assert len(ends) <= 3
        return reference.packed_attention(q_TNH, k_TGH, v_TGH, [0, *ends], scale)

    monkeypatch.setattr(impl_npu, "MAX_SAMPLES", 3)
    monkeypatch.setattr(impl_npu, "_attend", attend)
    cu = [0, 2, 3, 7, 8, 9, 12, 13]
    inputs = _inputs(13)
    assert torch.equal(impl_npu.packed_attention(*inputs, cu, 0.5), reference.packed_attention(*inputs, cu, 0.5))


def _shapes(tokens=6, heads=4, groups=2, size=32, dtype=torch.bfloat16):
    return [torch.empty(tokens, n, size, dtype=dtype, device="meta") for n in (heads, groups, groups)]


@pytest.mark.parametrize(
    ("shapes", "cu", "said"),
    [
        (_shapes(1_000_001), [0, 1_000_001], "at most 1,000,000 tokens in a pack; got 1,000,001"),
        (_shapes(heads=257, groups=257), [0, 6], "at most 256 query heads; got 257. raise parallel.tp"),
        (_shapes(size=769), [0, 6], "at most 768 as head size; got 769"),
        (_shapes(), [0, 4], "must rise strictly from 0 to T=6"),
        (_shapes(), [2, 6], "must rise strictly from 0 to T=6"),
        (_shapes(), [0, 3, 3, 6], "must rise strictly"),
        (_shapes(heads=4, groups=3), [0, 6], "query heads a multiple of key heads"),
        (_shapes(dtype=torch.float64), [0, 6], "must share float16, bfloat16 or float32; got torch.float64"),
        ([*_shapes()[:2], _shapes(dtype=torch.float16)[2]], [0, 6], "must share"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_the_npu_operator_does_not_check_is_refused(shapes, cu, said):
    with pytest.raises(ValueError, match=said):
        impl_npu.check(*shapes, list(cu))


def test_what_the_npu_operator_takes_passes():
    impl_npu.check(*_shapes(1024), list(range(1025)))
    impl_npu.check(*_shapes(heads=12, groups=6, size=128), [0, 2, 6])
    with pytest.raises(RuntimeError, match="needs an Ascend NPU, and the tensors are on cpu"):
        packed_attention(*_inputs(6), [0, 6], 1.0, impl="npu")


def test_unknown_implementation_and_shapes_are_refused():
    q, k, v = _inputs(6)
    with pytest.raises(ValueError, match="choose one of reference, sdpa, triton, npu"):
        packed_attention(q, k, v, [0, 6], 1.0, impl="flash")
    with pytest.raises(ValueError, match="multiple of G"):
        packed_attention(q[:, :3], k, v, [0, 6], 1.0, impl="sdpa")
    with pytest.raises(ValueError, match="one dtype"):
        packed_attention(q.bfloat16(), k, v, [0, 6], 1.0, impl="sdpa")
