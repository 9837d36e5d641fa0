"""Generation against transformers' own: greedy tokens, raw log-probs, seeds, batching."""

import json

import numpy as np
import pytest
import torch
from conftest import make_hf_model

from npd_ascend.rollout.engine import Request, Sampling, in_order
from npd_ascend.rollout.hf_engine import HfEngine, pick_tokens

EOS = 2


@pytest.fixture(scope="module", params=["llama", "pangu"])
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = make_hf_model(request.param)
    model.save_pretrained(folder)
    if request.param == "pangu":  # as the published config.json has it
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "model_type": "PanguEmbedded",
            "bias": config.pop("attention_bias"),
            "auto_map": {"AutoConfig": "x.Y"},
        }
        (folder / "config.json").write_text(json.dumps(config))
    engine = HfEngine(dtype=torch.float32, device=torch.device("cpu"), eos_id=EOS, pad_id=0, vocab_size=61)
    engine.load_weights(folder)
    return model, engine


PROMPTS = [(5, 9, 11), (7,), (3, 4, 5, 6, 7, 8, 9), (12, 13)]


@torch.inference_mode()
def _greedy_by_hand(model, prompt, limit):
    ids, logprobs = list(prompt), []
    for _ in range(limit):
        logits = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        ids.append(int(logits.argmax()))
        logprobs.append(float(logits.max()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :], logprobs


def test_greedy_equals_a_plain_loop_without_cache_or_batch(loaded):
    model, engine = loaded
    requests = [Request(prompt, limit, 0) for prompt, limit in zip(PROMPTS, (12, 5, 12, 1), strict=True)]
    for request, done in zip(requests, in_order(engine.generate(requests, Sampling(0.0))), strict=True):
        tokens, logprobs = _greedy_by_hand(model, request.token_ids, request.max_new_tokens)
        assert list(done.token_ids) == tokens
        assert np.abs(done.logprobs - logprobs).max() < 1e-5
        assert done.finish_reason == ("stop" if tokens[-1] == EOS else "length")


def test_answers_come_as_they_end(loaded):
    _, engine = loaded
    requests = [Request(prompt, limit, 0) for prompt, limit in zip(PROMPTS, (12, 5, 8, 1), strict=True)]
    finished = [(index, len(done.token_ids)) for index, done in engine.generate(requests, Sampling(0.0))]
    lengths = [length for _, length in finished]
    assert lengths == sorted(lengths)
    calls = []
    hook = engine._model.register_forward_pre_hook(lambda *_: calls.append(1))
    answers = engine.generate(requests, Sampling(0.0))
    index, first = next(answers)
    assert (index, len(first.token_ids), len(calls)) == (3, 1, 1)
    answers.close()
    hook.remove()


def test_a_sample_depends_on_its_seed_and_not_on_its_neighbours(loaded):
    _, engine = loaded
    requests = [Request(prompt, 16, seed) for seed, prompt in enumerate(PROMPTS * 3)]
    together = in_order(engine.generate(requests, Sampling(1.0)))
    alone = [in_order(engine.generate([request], Sampling(1.0)))[0] for request in requests]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert len({c.token_ids for c in together[::4]}) > 1  # same prompt, other seeds


def test_ids_that_stand_for_no_token_are_never_sampled(loaded):
    _, engine = loaded
    engine._vocab_size = 20
    done = in_order(engine.generate([Request(PROMPTS[0], 16, seed) for seed in range(8)], Sampling(1.0)))
    assert max(token for completion in done for token in completion.token_ids) < 20


def test_logprobs_are_raw_whatever_the_sampling_rule(loaded):
    """At temperature 1 over the full vocabulary: what IFD and drift need."""
    model, engine = loaded
    (done,) = in_order(engine.generate([Request(PROMPTS[0], 8, 3)], Sampling(0.5, 0.7)))
    ids = torch.tensor([[*PROMPTS[0], *done.token_ids]])
    logprobs = model(ids).logits[0].log_softmax(-1)[len(PROMPTS[0]) - 1 : -1]
    wanted = logprobs.gather(1, ids[0, len(PROMPTS[0]) :, None])[:, 0]
    assert np.abs(done.logprobs - wanted.detach().numpy()).max() < 1e-5


def test_tokens_are_drawn_from_the_distribution():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1]
    tokens = pick_tokens(probs.log().expand(len(draws), -1), draws, Sampling(1.0))
    assert np.abs(np.bincount(tokens, minlength=4) / len(draws) - probs.numpy()).max() < 1e-3
    nucleus = pick_tokens(probs.log().expand(len(draws), -1), draws, Sampling(1.0, 0.75))
    assert np.abs(np.bincount(nucleus, minlength=4) / len(draws) - [0.625, 0.375, 0, 0]).max() < 1e-3
    cold = pick_tokens(probs.log().expand(len(draws), -1), draws, Sampling(0.5))
    wanted = (probs**2 / (probs**2).sum()).numpy()
    assert np.abs(np.bincount(cold, minlength=4) / len(draws) - wanted).max() < 1e-3
