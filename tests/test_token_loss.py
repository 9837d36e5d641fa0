"""The per-token loss: float64 truth, plain code's own error as the bar, planted mistakes caught."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npd_kernels import streaming
from npd_kernels.token_loss import impl_chunked, reference, token_logprobs, token_loss


def _inputs(num_tokens=67, vocab=251, hidden=29, slots=4, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    weight_VD = torch.randn(vocab, hidden, generator=generator).to(dtype)
    ids_TK = torch.randint(vocab, (num_tokens, slots), generator=generator)
    weights_TK = torch.rand(num_tokens, slots, generator=generator)
    weights_TK[::5, -1] = 0  # unused slots
    token_weight_T = (
        torch.rand(num_tokens, generator=generator) * torch.tensor([0.01, 1.0, 100.0]).repeat(num_tokens)[:num_tokens]
    )
    return hidden_TD, weight_VD, ids_TK, weights_TK, token_weight_T


def _run(fn, inputs):
    hidden, weight = (x.detach().clone().requires_grad_() for x in inputs[:2])
    loss_sum, loss_T = fn(hidden, weight, *inputs[2:])
    return [loss_sum.detach()[None], loss_T, *torch.autograd.grad(loss_sum, [hidden, weight])]


def _plain(hidden, weight, ids, weights, token_weight):
    """Ordinary code: full logits, log-softmax in float32."""
    logprobs = torch.log_softmax((hidden @ weight.T).float(), -1)
    loss_T = -(weights * logprobs.gather(1, ids)).sum(1)
    return (token_weight * loss_T).sum(), loss_T.detach()


def _worst(got, want):
    return [float((g.double() - w).abs().max()) for g, w in zip(got, want, strict=True)]


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    """16 rows a chunk, so 67 tokens are four chunks and a ragged one."""
    monkeypatch.setattr(streaming, "CHUNK_BYTES", {"cpu": 16 * 4 * 251})


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_worse_than_plain_code(dtype, impl):
    inputs = _inputs(dtype=dtype)
    truth = _run(reference.token_loss, [x.double() if x.is_floating_point() else x for x in inputs])
    plain = _worst(_run(_plain, inputs), truth)
    fused = _worst(_run(lambda *x: token_loss(*x, impl=impl), inputs), truth)
    floors = [8 * torch.finfo(torch.float32).eps * float(t.abs().max()) for t in truth]
    for name, got, have, floor in zip(("sum", "loss", "d_hidden", "d_weight"), fused, plain, floors, strict=True):
        assert got <= 1.2 * max(have, floor), name


def _ragged_chunk_skipped(hidden, weight, *rest):
    whole = len(hidden) // 16 * 16
    return token_loss(hidden[:whole], weight, *(x[:whole] for x in rest), impl="chunked")


def _bf16_lse(hidden, weight, ids, weights, token_weight):
    logits = (hidden @ weight.T).float()
    loss_T = (weights * (logits.bfloat16().logsumexp(-1).float()[:, None] - logits.gather(1, ids))).sum(1)
    return (token_weight * loss_T).sum(), loss_T.detach()


def _repeated_id_overwrites(hidden, weight, ids, weights, token_weight):
    first = torch.ones_like(weights)
    first[:, 1:] = (ids[:, 1:] != ids[:, :1]).float()
    return token_loss(hidden, weight, ids, weights * first, token_weight, impl="chunked")


@pytest.mark.parametrize("mistake", [_ragged_chunk_skipped, _bf16_lse, _repeated_id_overwrites])
def test_planted_mistakes_are_caught(mistake):
    inputs = _inputs()
    inputs[2][8, 1] = inputs[2][8, 0]
    truth = _run(reference.token_loss, [x.double() if x.is_floating_point() else x for x in inputs])
    bar = 1.2 * max(_worst(_run(_plain, inputs), truth)[0], 8 * 1.2e-7 * float(truth[0].abs()))
    assert _worst(_run(mistake, inputs)[:1], truth[:1])[0] > 10 * bar


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 99), st.sampled_from(["chunked", "triton"]))
def test_any_shape_and_chunk_size(num_tokens, slots, seed, impl):
    inputs = _inputs(num_tokens, slots=slots, seed=seed)
    want = _run(reference.token_loss, [x.double() if x.is_floating_point() else x for x in inputs])
    got = _run(lambda *x: token_loss(*x, impl=impl), inputs)
    for have, truth in zip(got, want, strict=True):
        assert (have - truth).abs().max() <= 1e-5 * max(1.0, float(truth.abs().max()))


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_65_targets_a_token(impl):
    """The largest teacher.top_k and the given token."""
    inputs = _inputs(num_tokens=19, slots=65)
    want = _run(reference.token_loss, [x.double() if x.is_floating_point() else x for x in inputs])
    for have, truth in zip(_run(lambda *x: token_loss(*x, impl=impl), inputs), want, strict=True):
        assert (have - truth).abs().max() <= 1e-5 * max(1.0, float(truth.abs().max()))


def test_all_weights_zero_is_a_zero_gradient():
    inputs = list(_inputs())
    inputs[3] = torch.zeros_like(inputs[3])
    loss_sum, _, d_hidden, d_weight = _run(lambda *x: token_loss(*x, impl="chunked"), inputs)
    assert loss_sum == 0
    assert not d_hidden.any()
    assert not d_weight.any()


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
def test_tokens_of_weight_zero_are_left_out(monkeypatch, impl):
    """The same as without them, and on CPU no row of logits is made for them."""
    hidden, weight, ids, weights, token_weight = _inputs()
    live = torch.arange(67) % 3 == 0
    want = _run(
        lambda *x: token_loss(*x, impl=impl), (hidden[live], weight, ids[live], weights[live], token_weight[live])
    )
    made, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **out: made.append(a.shape[0]) or mm(a, b, **out))
    got = _run(lambda *x: token_loss(*x, impl=impl), (hidden, weight, ids, weights, token_weight * live))
    assert torch.allclose(got[0], want[0])
    assert torch.allclose(got[1][live], want[1])
    assert not got[1][~live].any()
    assert torch.allclose(got[2][live], want[2], rtol=1e-5, atol=1e-6)
    assert not got[2][~live].any()
    assert torch.allclose(got[3], want[3], rtol=1e-5, atol=1e-5)
    assert impl == "reference" or sum(made[::2]) == int(live.sum())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_is_formed_where_none_is_recorded(monkeypatch, mode):
    """Parameters ask for one everywhere, and it is two thirds of the work and [V, D] of memory."""
    hidden, weight, *rest = _inputs()
    weight = torch.nn.Parameter(weight)
    wanted = token_loss(hidden, weight, *rest, impl="chunked")[0]
    monkeypatch.setattr(impl_chunked.Rows, "gradient", None)
    with mode():
        assert token_loss(hidden, weight, *rest, impl="chunked")[0] == wanted


def test_gradient_scales_with_what_comes_from_above_and_is_given_once():
    hidden, weight, *rest = _inputs()
    hidden.requires_grad_()
    (once,) = torch.autograd.grad(token_loss(hidden, weight, *rest, impl="chunked")[0], hidden)
    loss_sum, _ = token_loss(hidden, weight, *rest, impl="chunked")
    (thrice,) = torch.autograd.grad(3 * loss_sum, hidden, retain_graph=True)
    assert torch.allclose(thrice, 3 * once)
    with pytest.raises(RuntimeError, match="backward was already called"):
        torch.autograd.grad(loss_sum, hidden)


def test_references_have_the_right_gradient():
    hidden, weight, ids, weights, token_weight = _inputs(5, 7, 3, 2)
    leaves = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    rest = (ids, weights.double(), token_weight.double())
    assert torch.autograd.gradcheck(lambda h, w: reference.token_loss(h, w, *rest)[0], leaves)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("frozen", ["none", "hidden", "weight"])
def test_token_logprobs_and_their_gradient(frozen, impl):
    hidden, weight, ids, upstream, _ = _inputs()
    grads = []
    for fn, cast in ((reference.token_logprobs, torch.Tensor.double), (None, torch.Tensor.float)):
        leaves = {"hidden": cast(hidden), "weight": cast(weight)}
        wanted = [leaf.requires_grad_() for name, leaf in leaves.items() if name != frozen]
        out = fn(*leaves.values(), ids) if fn else token_logprobs(*leaves.values(), ids, impl=impl)
        grads.append([out.detach(), *torch.autograd.grad((out * upstream).sum(), wanted)])
    for truth, got in zip(*grads, strict=True):
        assert (got - truth).abs().max() <= 1e-5 * max(1.0, float(truth.abs().max()))


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, ids, weights, token_weight = _inputs()
    with pytest.raises(ValueError, match=r"want \[T,K\]"):
        token_loss(hidden, weight, ids, weights[:, :2], token_weight, impl="chunked")
    with pytest.raises(ValueError, match="do not fit"):
        token_loss(hidden, weight[:, :3], ids, weights, token_weight, impl="chunked")
    with pytest.raises(ValueError, match="one dtype"):
        token_loss(hidden.bfloat16(), weight, ids, weights, token_weight, impl="chunked")
    with pytest.raises(ValueError, match="choose one of reference, chunked, triton, npu, mindspeed"):
        token_loss(hidden, weight, ids, weights, token_weight, impl="liger")


def _peak_bytes(tokens):
    script = Path(__file__).parent.parent / "benchmarks" / "train_step.py"
    command = [sys.executable, str(script), "--threads", "1", "--loss-memory", str(tokens), "--hidden", "64"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_peak_memory_does_not_grow_with_tokens_times_vocabulary():
    """Vocabulary 49,152: full float32 logits of 3,072 more tokens would be 604 MB more."""
    few, many = _peak_bytes(1024), _peak_bytes(4096)
    assert few > 49152 * 64 * 4  # the gradient of the weight at least, or nothing was measured
    assert many - few < 0.1 * 3072 * 49152 * 4  # 3,072 rows of hidden states and their gradients are 1.6 MB
