"""Divergences over the whole vocabulary: float64 truth, plain code's own error as the bar, planted mistakes caught."""

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from npd_kernels import streaming
from npd_kernels.dense_divergence import dense_divergence, reference
from npd_kernels.shard import VocabShard

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
VOCAB = 251  # of heads padded to 260 and 255 rows


def _inputs(num_tokens=35, dtype=torch.float32, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden_TD, weight_VD, teacher_TE, teacher_VE = (
        (spread * torch.randn(shape, generator=generator)).to(dtype)
        for shape in [(num_tokens, 29), (260, 29), (num_tokens, 31), (255, 31)]
    )
    token_weight_T = torch.rand(num_tokens, generator=generator)
    return hidden_TD, weight_VD, teacher_TE, teacher_VE, token_weight_T


def _run(fn, inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:2]]
    loss_sum, loss_T = fn(*leaves, *inputs[2:])
    return [loss_sum.detach()[None], loss_T, *torch.autograd.grad(loss_sum, leaves)]


def _ours(impl, beta, rows=VOCAB):
    return lambda *x: dense_divergence(*x, beta=beta, shard=VocabShard(0, rows, None), impl=impl)


def _truth(inputs, beta):
    return _run(_ours("reference", beta), [x.double() for x in inputs])


def _plain(beta):
    """Ordinary code: full log-softmax of both in float32 and torch's kl_div."""

    def divergence(hidden, weight, teacher_hidden, teacher_weight, token_weight):
        student = (hidden @ weight[:VOCAB].T).float().log_softmax(-1)
        teacher = (teacher_hidden @ teacher_weight[:VOCAB].T).float().log_softmax(-1)

        def kl(p, q):
            return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)

        if beta in (0, 1):
            loss_T = kl(student, teacher) if beta else kl(teacher, student)
        else:
            mixture = torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
            loss_T = beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)
        return (token_weight * loss_T).sum(), loss_T.detach()

    return divergence


def _worst(got, want):
    return [float((g.double() - w).abs().max() / w.abs().max()) for g, w in zip(got, want, strict=True)]


def _error(got, want):
    """In the root mean square: the largest of thousands of rounding errors is a matter of luck."""
    return [float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)]


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK_BYTES", {"cpu": 16 * 4 * 260})


_CASES = [(impl, torch.float32, beta) for impl in ("chunked", "triton") for beta in BETAS]
_CASES += [("chunked", torch.bfloat16, beta) for beta in BETAS] + [("triton", torch.bfloat16, 0.5)]


@pytest.mark.parametrize(("impl", "dtype", "beta"), _CASES, ids=str)
def test_no_worse_than_plain_code(impl, dtype, beta):
    plain, ours = [], []
    for seed in range(4):  # without spread and several draws a few saturated tokens would decide
        inputs = _inputs(dtype=dtype, seed=seed, spread=0.5)
        truth = _truth(inputs, beta)
        plain.append(_error(_run(_plain(beta), inputs), truth))
        ours.append(_error(_run(_ours(impl, beta), inputs), truth))
    errors = zip(*torch.tensor([plain, ours]).mean(1).tolist(), strict=True)
    for name, (bar, have) in zip(("sum", "loss", "d_hidden", "d_weight"), errors, strict=True):
        assert have <= 1.2 * max(bar, 8 * torch.finfo(torch.float32).eps), name


def test_the_limits_are_the_kl_divergences():
    """What the mixture form tends to, divided by beta and by 1 - beta, is what 0 and 1 stand for."""
    inputs = [x.double() for x in _inputs(spread=0.3)]
    for exact, near in ((0.0, 1e-7), (1.0, 1 - 1e-7)):
        nearly = [x / min(near, 1 - near) for x in _truth(inputs, near)]
        # what is left is of the order of beta times the largest ratio of two probabilities
        assert max(_worst(nearly, _truth(inputs, exact))) < 1e-4
        halfway = [x / 0.5 for x in _truth(inputs, 0.5)]
        assert max(_worst(halfway, _truth(inputs, exact))) > 0.3


def _teacher_and_student_swapped(impl, beta):
    return _ours(impl, 1 - beta)


def _padding_gets_mass(impl, beta):
    return _ours(impl, beta, rows=255)


def _ragged_chunk_skipped(impl, beta):
    def divergence(hidden, weight, teacher, teacher_weight, token_weight):
        return _ours(impl, beta)(hidden[:32], weight, teacher[:32], teacher_weight, token_weight[:32])

    return divergence


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("mistake", [_teacher_and_student_swapped, _padding_gets_mass, _ragged_chunk_skipped])
def test_planted_mistakes_are_caught(mistake, beta, impl):
    inputs = _inputs()
    got, truth = _run(mistake(impl, beta), inputs), _truth(inputs, beta)
    assert _worst([got[3]], [truth[3]])[0] > 1e-2  # the gradient of the head


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(0, 99), st.sampled_from(BETAS), st.sampled_from(["chunked", "triton"]))
def test_any_number_of_tokens(num_tokens, seed, beta, impl):
    inputs = _inputs(num_tokens, seed=seed, spread=0.5)
    assert max(_worst(_run(_ours(impl, beta), inputs), _truth(inputs, beta))) < 3e-5


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("beta", BETAS)
def test_equal_models_have_no_divergence_and_no_gradient(beta, impl):
    hidden, weight, *_, token_weight = _inputs()
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss_sum, _ = dense_divergence(*leaves, hidden, weight, token_weight, beta=beta, impl=impl)
    assert loss_sum.detach().abs() < 1e-4
    for grad in torch.autograd.grad(loss_sum, leaves):
        assert grad.abs().max() < 1e-4


@pytest.mark.parametrize("beta", BETAS)
def test_references_have_the_right_gradient(beta):
    inputs = [x.double() for x in _inputs(5)]
    hidden, weight, teacher, teacher_weight, token_weight = inputs
    leaves = [hidden[:, :3].clone().requires_grad_(), weight[:7, :3].clone().requires_grad_()]
    rest = (teacher, teacher_weight[:7], token_weight, beta, VocabShard(0, 7, None))
    assert torch.autograd.gradcheck(lambda h, w: reference.dense_divergence(h, w, *rest)[0], leaves)


def _on_one_rank(mesh, impl, beta, mistake=""):
    streaming.CHUNK_BYTES = {"cpu": 16 * 4 * 64}
    hidden, weight, teacher, teacher_weight, token_weight = _inputs()
    rows = -(-VOCAB // mesh.tp)
    start = mesh.tp_rank * rows
    stop = min(start + rows, VOCAB)
    # heads padded differently, with what would be noticed
    cut = [
        torch.cat([whole[start:stop], torch.full((rows - (stop - start) + more, whole.shape[1]), 2.0)])
        for more, whole in enumerate((weight, teacher_weight))
    ]
    shard = VocabShard(start, stop + (mistake == "padding unmasked" and stop == VOCAB), mesh.tp_group)
    leaves = [hidden.clone().requires_grad_(), cut[0].requires_grad_()]
    loss_sum, loss_T = dense_divergence(*leaves, teacher, cut[1], token_weight, beta=beta, shard=shard, impl=impl)
    d_hidden, d_weight = torch.autograd.grad(loss_sum, leaves)
    dist.all_reduce(d_hidden, group=mesh.tp_group)
    return [loss_sum.detach()[None], loss_T, d_hidden, d_weight[: stop - start]]


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_cut_head_gives_the_same(ranks, beta, impl):
    truth = _truth(_inputs(), beta)
    truth[3] = truth[3][:VOCAB]
    parts = ranks.run(_on_one_rank, (4, 1, False), impl, beta)
    joined = [*parts[0][:3], torch.cat([part[3] for part in parts])]
    assert max(_worst(joined, truth)) < 1e-5
    for part in parts[1:]:
        assert torch.equal(part[1], parts[0][1])
    wrong = ranks.run(_on_one_rank, (4, 1, False), impl, beta, "padding unmasked")
    assert _worst(wrong[0][:1], truth[:1])[0] > 1e-3


def test_what_does_not_fit_is_refused():
    hidden, weight, teacher, teacher_weight, token_weight = _inputs()
    with pytest.raises(ValueError, match=r"heads of 260 and 255 rows: say how many stand for tokens"):
        dense_divergence(hidden, weight, teacher, teacher_weight, token_weight, beta=0.0, impl="chunked")
    with pytest.raises(ValueError, match="must lie between 0"):
        _ours("chunked", 1.5)(hidden, weight, teacher, teacher_weight, token_weight)
    with pytest.raises(ValueError, match="one row per token"):
        _ours("chunked", 0.5)(hidden, weight, teacher[:3], teacher_weight, token_weight)
    with pytest.raises(ValueError, match="do not fit heads of 260 and 255"):
        _ours("chunked", 0.5, rows=256)(hidden, weight, teacher, teacher_weight, token_weight)
