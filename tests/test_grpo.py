"""GRPO against plain autograd in float64, on numbers by hand, and with mistakes planted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_hf_model, make_samples

from npd_ascend.config import GrpoConfig, OptimizerConfig
from npd_ascend.model.load import load_decoder
from npd_ascend.trainer import objectives, policy_loss
from npd_ascend.trainer.objectives import Objective, make_batch, weight_sum, with_reference
from npd_ascend.trainer.optimizer import MasterAdamW
from npd_ascend.trainer.policy_loss import group_advantages
from npd_ascend.trainer.step import train_step

CPU = torch.device("cpu")
GRPO = GrpoConfig(clip_low=0.2, clip_high=0.3, kl_weight=0.1)
LENGTHS = [7, 2, 5, 1, 9, 3, 4, 6]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(transformers student in float64, its folder, transformers reference in float64, its folder)."""
    found = []
    for name, seed in (("student", 0), ("reference", 1)):
        folder = tmp_path_factory.mktemp(name)
        model = make_hf_model("llama", seed=seed)
        model.save_pretrained(folder)
        found += [model.double(), folder]
    return found


def plain_logprobs(model, sample):
    """float64 [A] of one sample alone, no packing, with its graph."""
    ids = torch.tensor(sample.token_ids)
    logits = model(ids[None]).logits[0, sample.prompt_len - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[sample.prompt_len :, None])[:, 0]


@pytest.fixture(scope="module")
def samples(models):
    """Two groups; generators that lie on both sides of the clip for both signs of the advantage."""
    random, made = np.random.Generator(np.random.PCG64(3)), make_samples(LENGTHS, seed=5)
    advantages = [*group_advantages([1.0, 0.0, 0.5, 0.0]), *group_advantages([0.0, 1.0, 1.0, 1.0])]
    found = []
    for sample, advantage in zip(made, advantages, strict=True):
        own = plain_logprobs(models[0], sample).detach().numpy()
        generator = (own + random.uniform(-0.8, 0.8, len(own))).astype(np.float32)
        found.append(replace(sample, advantage=advantage, generator_logprobs=generator))
    return found


def wanted_gradients(models, samples, grpo, normalise):
    """(loss, gradients) of the formula as it stands in the paper, in float64."""
    student, _, reference, _ = models
    student.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    count = 0.0
    for sample in samples:
        logprobs, given = plain_logprobs(student, sample), torch.from_numpy(sample.generator_logprobs).double()
        with torch.no_grad():
            start = plain_logprobs(reference, sample)
        ratio = torch.exp(logprobs - given)
        clipped = torch.clip(ratio, 1 - grpo.clip_low, 1 + grpo.clip_high)
        gain = torch.where(
            ratio * sample.advantage < clipped * sample.advantage, ratio * sample.advantage, clipped * sample.advantage
        )
        k3 = torch.exp(start) / torch.exp(logprobs) - torch.log(torch.exp(start) / torch.exp(logprobs)) - 1
        weight = {"token": 1.0, "sample": 1 / len(logprobs)}[normalise]
        count += weight * len(logprobs)
        total = total - weight * (gain - grpo.kl_weight * k3).sum()
    (total / count).backward()
    return (total / count).item(), {name: p.grad.clone() for name, p in student.named_parameters()}


def our_gradients(models, packs, grpo=GRPO, normalise="token", impl="chunked"):
    """(StepStats, gradients by the names of our decoder) of one step over `packs`, without the update."""
    model = load_decoder(models[1], dtype=torch.float32, device=CPU)
    reference = load_decoder(models[3], dtype=torch.float32, device=CPU)
    objective = Objective(normalise=normalise, loss_impl=impl, grpo=grpo)
    optimizer, grads = MasterAdamW(model, OptimizerConfig(clip_norm=1e9)), {}
    take = optimizer.gradients.take
    optimizer.gradients.take = lambda: grads.update(take()) or dict(grads)
    batches = [with_reference(make_batch(pack, objective, CPU), reference, objective) for pack in packs]
    total = weight_sum([sample for pack in packs for sample in pack], objective)
    stats = train_step(model, batches, optimizer, objective, weight_sum=total, lr=0.0)
    return stats, grads


def difference(models, samples, normalise="token", planted=None, impl="chunked", packs=None):
    """Largest relative distance from the float64 gradients over tensors of every layer, and that of the loss."""
    wanted_loss, wanted = wanted_gradients(models, samples, GRPO, normalise)
    stats, grads = our_gradients(models, packs or [samples], GRPO, planted or normalise, impl)
    names = {"norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
    names |= {f"layers.{i}.mlp.down.weight": f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}
    names |= {f"layers.{i}.attention.out.weight": f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2)}
    far = [float((grads[o].double() - wanted[t]).abs().max() / wanted[t].abs().max()) for o, t in names.items()]
    return max(far), abs(stats.loss - wanted_loss)


@pytest.mark.parametrize("normalise", ["token", "sample"])
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_gradient_is_that_of_plain_autograd(models, samples, normalise, impl):
    far, loss = difference(models, samples, normalise, impl=impl)
    assert far < 2e-5
    assert loss < 2e-5


@pytest.mark.parametrize("split", ["one each", "uneven", "backwards"])
def test_packing_changes_nothing(models, samples, split):
    packs = {"one each": [[s] for s in samples], "uneven": [samples[:5], samples[5:]], "backwards": [samples[::-1]]}
    assert difference(models, samples, packs=packs[split])[0] < 2e-5


def no_clip(logprobs_A, targets, config):
    return REAL(logprobs_A, targets, config.model_copy(update={"clip_low": 0.999999, "clip_high": 1e9}))


def wrong_sign(logprobs_A, targets, config):
    return REAL(logprobs_A, replace(targets, advantage_A=-targets.advantage_A), config)


def wrong_mask(logprobs_A, targets, config):
    """The advantage of one answer reaches a token into the next."""
    return REAL(logprobs_A, replace(targets, advantage_A=targets.advantage_A.roll(1)), config)


def no_kl_gradient(logprobs_A, targets, config):
    return REAL(logprobs_A, replace(targets, reference_logprobs_A=logprobs_A.detach()), config)


REAL = policy_loss.policy_loss


@pytest.mark.parametrize("mistake", [no_clip, wrong_sign, wrong_mask, no_kl_gradient])
def test_a_planted_mistake_is_seen(models, samples, mistake, monkeypatch):
    monkeypatch.setattr(objectives, "policy_loss", mistake)
    assert difference(models, samples)[0] > 1e-2


def test_per_sample_in_the_place_of_per_token_is_seen(models, samples):
    assert difference(models, samples, "token", planted="sample")[0] > 1e-2


def test_what_is_watched_is_counted_over_the_tokens(models, samples):
    stats, _ = our_gradients(models, [samples[:3], samples[3:]])
    clipped, kl, entropy = 0, 0.0, 0.0
    for sample in samples:
        logprobs, start = (plain_logprobs(model, sample).detach() for model in (models[0], models[2]))
        ratio = (logprobs - torch.from_numpy(sample.generator_logprobs)).exp()
        clipped += int(((ratio > 1.3) if sample.advantage > 0 else (ratio < 0.8)).sum())
        kl += float(torch.expm1(start - logprobs).sum() - (start - logprobs).sum())
        entropy -= float(logprobs.sum())
    assert 0 < clipped < sum(LENGTHS)
    assert stats.watched["grpo__clipped"] == clipped
    assert stats.watched["grpo__kl"] == pytest.approx(kl, rel=1e-4)
    assert stats.watched["grpo__entropy"] == pytest.approx(entropy, rel=1e-4)


def test_an_answer_without_advantage_has_a_gradient_of_exactly_zero(models, samples):
    silent = [replace(sample, advantage=0.0) for sample in samples]
    _, grads = our_gradients(models, [silent], GRPO.model_copy(update={"kl_weight": 0.0}))
    assert all(not grad.any() for grad in grads.values())


def test_advantages_by_hand():
    assert group_advantages([1.0, 0.0, 0.0, 1.0]) == [1.0, -1.0, -1.0, 1.0]
    assert group_advantages([3.0, 0.0, 0.0]) == pytest.approx([2**0.5, -(0.5**0.5), -(0.5**0.5)])
    assert group_advantages([1.0, None, 0.0]) == [1.0, None, -1.0]  # a reward that is not known is not a zero
    for nothing_to_learn in ([0.0] * 4, [1.0] * 4, [0.5, None], [None, None], [0.3, 0.1 + 0.2]):
        assert group_advantages(nothing_to_learn) == [None] * len(nothing_to_learn)
