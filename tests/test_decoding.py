"""The trainer's own greedy answers against transformers, token by token, and on every layout of ranks."""

import pytest
import torch
from conftest import CONFIGS, FAMILIES, make_hf_model

from npd_ascend.config import load_config
from npd_ascend.model.decoder import Decoder
from npd_ascend.model.load import load_decoder
from npd_ascend.parallel.mesh import ALONE
from npd_ascend.parallel.plan import cut_model
from npd_ascend.trainer import decoding
from npd_ascend.trainer.decoding import greedy_answers
from npd_ascend.trainer.heldout import Heldout, Questions
from npd_ascend.trainer.samples import heldout_references

CPU = torch.device("cpu")
PROMPTS = [(5, 9, 11), (7,), (3, 4, 5, 6, 7, 8, 9), (12, 13), (60, 3), (22, 41, 8, 8)]
LIMIT, VOCAB = 12, 55  # of 61 ids; the others are never given


@torch.inference_mode()
def by_hand(model, prompt, eos_id):
    """(tokens, entropies) without a cache, in float64."""
    ids, entropies = list(prompt), []
    for _ in range(LIMIT):
        logprobs_V = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        ids.append(int(logprobs_V[:VOCAB].argmax()))
        entropies.append(float(-(logprobs_V.exp() * logprobs_V).sum()))
        if ids[-1] == eos_id:
            break
    return ids[len(prompt) :], entropies


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request, tmp_path_factory):
    """(folder, an end token that some answers reach on the way and others never do, answers by hand)."""
    model = make_hf_model(request.param)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    model.double()
    free = [by_hand(model, prompt, None)[0] for prompt in PROMPTS]
    shares = {token: sum(token in answer[:-1] for answer in free) for answer in free for token in answer}
    eos_id = next(token for token, count in sorted(shares.items()) if 0 < count < len(PROMPTS))
    return folder, eos_id, [by_hand(model, prompt, eos_id) for prompt in PROMPTS]


def answered(model, eos_id, prompts=PROMPTS):
    return greedy_answers(model, prompts, max_new_tokens=LIMIT, eos_id=eos_id, vocab_size=VOCAB)


def is_right(answers, wanted) -> bool:
    return all(
        answer.token_ids == tokens and answer.entropies.tolist() == pytest.approx(entropies, abs=1e-4)
        for answer, (tokens, entropies) in zip(answers, wanted, strict=True)
    )


def test_it_gives_what_transformers_gives_without_a_cache(case):
    folder, eos_id, wanted = case
    model = load_decoder(folder, dtype=torch.float32, device=CPU)
    assert is_right(answered(model, eos_id), wanted)
    assert {len(tokens) for tokens, _ in wanted} > {LIMIT}  # some end, others are cut
    alone = [answered(model, eos_id, [prompt])[0] for prompt in PROMPTS]
    assert is_right(alone, wanted)


def _everything_is_visible(monkeypatch):
    attend = decoding.scaled_dot_product_attention
    monkeypatch.setattr(
        decoding,
        "scaled_dot_product_attention",
        lambda *tensors, attn_mask, **more: attend(*tensors, attn_mask=torch.ones_like(attn_mask), **more),
    )


def _a_place_late(monkeypatch):
    attend = decoding._attend

    def late(q_k_v, places_BS, kept, used, scale):
        return attend(q_k_v, places_BS + (places_BS.shape[1] == 1 and used < kept[0].shape[1]), kept, used, scale)

    monkeypatch.setattr(decoding, "_attend", late)


def _a_cache_with_what_was_there_before(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "new_zeros", lambda self, shape: self.new_full(shape, torch.nan))


def _every_token_at_position_0(monkeypatch):
    rotary = Decoder.rotary
    monkeypatch.setattr(
        Decoder,
        "rotary",
        lambda self, positions_T: rotary(self, positions_T * (len(positions_T) > len(PROMPTS))),
    )


def _entropy_of_what_can_be_given(monkeypatch):
    entropies = decoding.entropies
    monkeypatch.setattr(
        decoding, "entropies", lambda hidden, head, *, shard: entropies(hidden, head[:VOCAB], shard=shard)
    )


MISTAKES = [
    _everything_is_visible,
    _a_place_late,
    _a_cache_with_what_was_there_before,
    _every_token_at_position_0,
    _entropy_of_what_can_be_given,
]


@pytest.mark.parametrize("plant", MISTAKES, ids=lambda plant: plant.__name__.strip("_"))
def test_planted_mistakes_are_seen(case, plant, monkeypatch):
    folder, eos_id, wanted = case
    plant(monkeypatch)
    assert not is_right(answered(load_decoder(folder, dtype=torch.float32, device=CPU), eos_id), wanted)


def measured_on_one_rank(mesh, folder, eos_id, batch):
    model = load_decoder(folder, dtype=torch.float32, device=CPU, cut=lambda decoder: cut_model(decoder, mesh))
    questions = Questions(prompts=PROMPTS, batch=batch, max_new_tokens=LIMIT, eos_id=eos_id, vocab_size=VOCAB)
    measured = Heldout(questions=questions).measure(model, mesh)
    return measured["heldout__answer_tokens"], measured["heldout__entropy"]


@pytest.mark.parametrize("layout", [(2, 1, False), (2, 1, True), (4, 1, False), (1, 4, False), (2, 2, True)], ids=str)
def test_length_and_entropy_are_the_same_on_every_layout(ranks, case, layout):
    folder, eos_id, answers = case
    tokens = sum(len(tokens) for tokens, _ in answers)
    wanted = (tokens / len(PROMPTS), sum(sum(entropies) for _, entropies in answers) / tokens)
    assert measured_on_one_rank(ALONE, folder, eos_id, 4) == pytest.approx(wanted, abs=1e-5)
    for measured in ranks.run(measured_on_one_rank, layout, folder, eos_id, 1 if layout[1] > 1 else 3):
        assert measured == pytest.approx(wanted, abs=1e-5)


def test_no_more_is_answered_at_once_than_a_pack_holds():
    more = ["evaluate={max_new_tokens: 6, answers: 7, every_steps: 2}", "sft.pack_tokens=64"]
    config = load_config(CONFIGS / "addition_cpu.yaml", more)
    questions = heldout_references(config, config.sft, ALONE).questions
    assert len(questions.prompts) == 7
    longest = max(len(prompt) for prompt in questions.prompts)
    assert questions.batch * (longest + 6) <= 64 < (questions.batch + 1) * (longest + 6)
