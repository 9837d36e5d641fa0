"""SFT and NPD on numbers worked by hand, and independence of how samples are packed and split."""

import math

import numpy as np
import pytest
import torch
from conftest import CONFIGS, make_samples

from npd_ascend.config import OptimizerConfig
from npd_ascend.errors import UserError
from npd_ascend.model.decoder import Kernels
from npd_ascend.model.load import load_decoder
from npd_ascend.records import Sample
from npd_ascend.trainer.objectives import Objective, batch_loss, divergence, make_batch, weight_sum
from npd_ascend.trainer.optimizer import MasterAdamW
from npd_ascend.trainer.schedule import learning_rate
from npd_ascend.trainer.step import train_step

CPU = torch.device("cpu")


def _one_token(logits, target, topk, lambda_, targets="renormalised", divergence="forward"):
    """Loss of one answer token whose student logits are `logits`."""
    ids, probs = np.array([list(topk)], np.int32), np.log(np.array([list(topk.values())], np.float32))
    sample = Sample(
        sample_id="a", token_ids=(0, target), prompt_len=1, teacher_topk_ids=ids, teacher_topk_logprobs=probs
    )
    objective = Objective(lambda_=lambda_, targets=targets, divergence=divergence)
    batch = make_batch([sample], objective, CPU)
    weight_VD = torch.tensor(logits)[:, None]
    return float(batch_loss(torch.ones(1, 1), weight_VD, batch, objective)[0])


LOGITS = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]


def test_npd_loss_by_hand():
    # teacher top-2 {0: 0.6, 2: 0.2} renormalises to {0: 3/4, 2: 1/4}; sampled token 1
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.15)
    wanted = 0.1 * -math.log(0.3) + 0.9 * kl
    assert _one_token(LOGITS, 1, {0: 0.6, 2: 0.2}, 0.9) == pytest.approx(wanted, rel=1e-5)


def test_tail_bucket_by_hand():
    kl = 0.6 * math.log(0.6 / 0.5) + 0.2 * math.log(0.2 / 0.15) + 0.2 * math.log(0.2 / 0.35)
    wanted = 0.1 * -math.log(0.3) + 0.9 * kl
    assert _one_token(LOGITS, 1, {0: 0.6, 2: 0.2}, 0.9, "tail") == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", ["reverse", "jsd"])
def test_other_divergences_by_hand(kind):
    teacher, student = [0.6, 0.2, 0.2], [0.5, 0.15, 0.35]  # tokens 0 and 2, and the rest
    mean = [(p + q) / 2 for p, q in zip(teacher, student, strict=True)]

    def kl(left, right):
        return sum(p * math.log(p / q) for p, q in zip(left, right, strict=True))

    wanted = {"reverse": kl(student, teacher), "jsd": (kl(teacher, mean) + kl(student, mean)) / 2}[kind]
    got = _one_token(LOGITS, 1, {0: 0.6, 2: 0.2}, 1.0, "tail", kind)
    assert got == pytest.approx(wanted, rel=1e-5)
    assert abs(got - kl(teacher, student)) > 1e-3 * got  # the forward one would be seen


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_divergences_have_the_gradient_of_float64(kind):
    """Also where the teacher has no tail, and the student's is rounding."""
    random = torch.Generator().manual_seed(0)
    teacher = torch.rand(50, 6, generator=random, dtype=torch.float64).pow(4)
    teacher[:10, -1] = 0
    teacher /= teacher.sum(-1, keepdim=True)
    logits = torch.randn(50, 6, generator=random, dtype=torch.float64) * 3
    exact, plain = logits.clone().requires_grad_(), logits.float().requires_grad_()
    floor = teacher.clamp(min=1e-6)
    p, log_q = teacher, exact.log_softmax(-1)
    q, middle = log_q.exp(), (p + log_q.exp()) / 2
    wanted = {
        "forward": (torch.special.xlogy(p, p) - p * log_q).sum(),
        "reverse": (q * (log_q - floor.log())).sum(),
        "jsd": 0.5 * (torch.special.xlogy(p, p) - torch.special.xlogy(p, middle)).sum()
        + 0.5 * (q * (q / middle).log()).sum(),
    }[kind]
    wanted.backward()
    divergence(teacher.float(), plain.log_softmax(-1), kind).sum().backward()
    assert (plain.grad - exact.grad).abs().max() < 1e-5 * exact.grad.abs().max()


@pytest.mark.parametrize("kind", ["reverse", "jsd"])
def test_another_divergence_does_not_depend_on_packs(kind):
    objective = Objective(lambda_=0.9, targets="tail", divergence=kind)
    (wanted_loss, wanted), (loss, grads) = (_gradients(split, objective) for split in ([SAMPLES], SPLITS["uneven"]))
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    for name, grad in wanted.items():
        assert (grads[name] - grad).abs().max() <= 1e-5 * grad.abs().max() + 1e-9, name


@pytest.mark.parametrize("targets", ["renormalised", "tail"])
def test_a_student_that_equals_the_teacher_has_zero_kl(targets):
    everything = dict(enumerate((0.5, 0.3, 0.15, 0.05)))
    assert _one_token(LOGITS, 1, everything, 1.0, targets) == pytest.approx(0, abs=1e-5)


def test_sft_is_plain_cross_entropy():
    assert _one_token(LOGITS, 2, {0: 0.9}, 0.0) == pytest.approx(-math.log(0.15), rel=1e-5)


def _gradients(split, objective, attention="sdpa"):
    """(loss, gradients) of one step over packs given as lists of samples, without the update."""
    model = load_decoder(
        CONFIGS / "addition" / "student", seed=0, dtype=torch.float32, device=CPU, kernels=Kernels(attention, "torch")
    )
    optimizer = MasterAdamW(model, OptimizerConfig(clip_norm=1e9))
    grads = {}
    take = optimizer.gradients.take
    optimizer.gradients.take = lambda: grads.update(take()) or dict(grads)
    return _step(model, split, optimizer, objective, lr=0.0).loss, grads


def _step(model, packs, optimizer, objective, lr):
    total = weight_sum([sample for pack in packs for sample in pack], objective)
    batches = [make_batch(pack, objective, CPU) for pack in packs]
    return train_step(model, batches, optimizer, objective, weight_sum=total, lr=lr)


SAMPLES = make_samples([1, 20, 3, 7, 7, 2, 1, 13], 15)
SPLITS = {
    "each alone": [[s] for s in SAMPLES],
    "two packs": [SAMPLES[:3], SAMPLES[3:]],
    "backwards": [SAMPLES[::-1]],
    "uneven": [SAMPLES[1:], SAMPLES[:1]],
}


@pytest.mark.parametrize("normalise", ["token", "sample", "sqrt"])
@pytest.mark.parametrize("targets", ["renormalised", "tail"])
@pytest.mark.parametrize("split", list(SPLITS))
def test_packing_and_splitting_change_nothing(split, targets, normalise, monkeypatch):
    objective = Objective(lambda_=0.9, targets=targets, normalise=normalise)
    wanted_loss, wanted = _gradients(
        [SAMPLES], Objective(lambda_=0.9, targets=targets, normalise=normalise, loss_impl="reference"), "reference"
    )
    for chunk_bytes in (4 * 15 * 3, 2**20):  # three rows a chunk, or everything at once
        monkeypatch.setattr("npd_kernels.streaming.CHUNK_BYTES", {"cpu": chunk_bytes})
        loss, grads = _gradients(SPLITS[split], objective)
        assert loss == pytest.approx(wanted_loss, rel=1e-5)
        for name, grad in wanted.items():
            assert (grads[name] - grad).abs().max() <= 1e-5 * grad.abs().max() + 1e-9, name


def test_a_mean_of_means_would_be_seen():
    """Planted mistake: dividing each pack by its own token count moves the loss far outside the tolerance."""
    objective = Objective(lambda_=0.9)
    wanted, _ = _gradients([SAMPLES], objective)
    means = [_gradients([pack], objective)[0] for pack in SPLITS["two packs"]]
    assert abs(sum(means) / 2 - wanted) > 1e-3 * abs(wanted)


def test_normalisation_by_hand():
    """Two samples of 1 and 4 answer tokens: token weights 1, 1/len, 1/sqrt(len)."""
    two = make_samples([1, 4], 15)
    per_sample = [_gradients([[sample]], Objective(lambda_=0.9))[0] for sample in two]
    for normalise, weights in {"token": (1, 4), "sample": (1, 1), "sqrt": (1, 2)}.items():
        wanted = (weights[0] * per_sample[0] + weights[1] * per_sample[1]) / sum(weights)
        assert _gradients([two], Objective(lambda_=0.9, normalise=normalise))[0] == pytest.approx(wanted, rel=1e-5)


def test_bfloat16_keeps_float32_masters():
    """An update far below bfloat16's rounding is lost without masters and adds up with them."""
    model = load_decoder(CONFIGS / "addition" / "student", seed=0, dtype=torch.bfloat16, device=CPU)
    objective, before = Objective(lambda_=0.9), model.layers[0].mlp.down.weight.float().clone()
    optimizer = MasterAdamW(model, OptimizerConfig())
    for _ in range(80):
        _step(model, [SAMPLES], optimizer, objective, lr=2e-6)
    moved = (model.layers[0].mlp.down.weight.float() - before).abs().max()
    assert moved > 1e-4
    assert model.layers[0].mlp.down.weight.dtype == torch.bfloat16
    lost = before.bfloat16() - torch.tensor(2e-6).bfloat16()
    assert ((lost.float() - before).abs() > 0).float().mean() < 0.1  # one such step alone rounds away almost everywhere


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    model = load_decoder(CONFIGS / "addition" / "student", seed=0, dtype=torch.float32, device=CPU)
    with torch.no_grad():
        model.layers[0].mlp.down.weight[0, 0] = float("nan")
    before = [p.clone() for p in model.parameters()]
    objective, optimizer = Objective(), MasterAdamW(model, OptimizerConfig())
    with pytest.raises(UserError, match="the loss is nan"):
        _step(model, [SAMPLES], optimizer, objective, lr=1.0)
    assert all(torch.equal(a, b) for a, b in zip(before[1:3], list(model.parameters())[1:3], strict=True))


def test_learning_rate_is_one_cosine_over_all_epochs():
    config = OptimizerConfig(lr=1e-5, min_lr=1e-6, warmup_steps=10)
    assert learning_rate(0.0, 0, config) == pytest.approx(1e-6)  # a tenth of the way up
    assert learning_rate(0.5, 500, config) == pytest.approx(5.5e-6)
    assert learning_rate(1.0, 999, config) == pytest.approx(1e-6)
