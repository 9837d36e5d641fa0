"""Exact match without generating, against `npd eval`; what is measured, and when."""

import dataclasses
import json

import pytest
import torch
from conftest import CONFIGS, make_samples

from npd_ascend.config import TrainConfig, load_config
from npd_ascend.evaluate.exact_match import exact_match
from npd_ascend.model.load import load_decoder, save_decoder
from npd_ascend.parallel.mesh import ALONE
from npd_ascend.prompts import read_heldout
from npd_ascend.tokenizer import ChatTokenizer
from npd_ascend.trainer import heldout as heldout_module
from npd_ascend.trainer import samples as samples_module
from npd_ascend.trainer.heldout import Heldout
from npd_ascend.trainer.loop import fit
from npd_ascend.trainer.objectives import Objective
from npd_ascend.trainer.samples import heldout_references

CPU = torch.device("cpu")
TEACHER = CONFIGS / "addition" / "teacher"
LIMIT = 4  # tokens: a sum above 999 leaves no room for the end token


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """120 sums. Half of the reference answers are right; others are right as far as they go, or are too long."""
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = []
    for i in range(120):
        a, b = 150 + 7 * i, 120 + 3 * i
        right = str(a + b)
        answer = (right, right, right, right[:2], right[:3] + "77", right + "000")[i % 6]
        rows.append(json.dumps({"prompt": f"{a}+{b}", "answer": answer}))
    file.write_text("\n".join(rows) + "\n")
    heldout = f"data.heldout={{kind: jsonl, path: {file}}}"
    more = [heldout, f"student.path={TEACHER}", f"evaluate={{max_new_tokens: {LIMIT}, every_steps: 2}}"]
    return load_config(CONFIGS / "addition_cpu.yaml", more)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """(model, folder) of the addition teacher with noise on its weights, so that it is sometimes wrong."""
    model = load_decoder(TEACHER, dtype=torch.float32, device=CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("noisy") / "student"
    save_decoder(model, TEACHER, folder)
    return model, folder


@pytest.fixture(scope="module")
def wanted(config, student):
    """What `npd eval` counts: by decoding, text against text."""
    tokenizer = ChatTokenizer(TEACHER)
    prompts = read_heldout(config, tokenizer, LIMIT)
    return exact_match(config, student[1], tokenizer, prompts, "student")["exact_match"]


def measured(config, model) -> float:
    return heldout_references(config, config.sft, ALONE).measure(model)["heldout__exact_match"]


def test_one_pass_over_the_answers_counts_what_decoding_counts(config, student, wanted):
    assert 0.1 < wanted < 0.49  # half of the answers are right
    assert measured(config, student[0]) == pytest.approx(wanted, abs=1e-9)


def _without_the_end(monkeypatch):
    encode = ChatTokenizer.encode_answer
    monkeypatch.setattr(ChatTokenizer, "encode_answer", lambda self, text: encode(self, text)[:-1])


def _one_place_late(monkeypatch):
    lay_out = heldout_module.lay_out

    def late(*arguments):
        layout = lay_out(*arguments)
        return dataclasses.replace(layout, predict_A=layout.predict_A + 1)

    monkeypatch.setattr(heldout_module, "lay_out", late)


def _one_right_token_is_enough(monkeypatch):
    greedy_ids = heldout_module.greedy_ids

    def first_token_given(hidden_AD, *arguments, **more):
        ids_A = greedy_ids(hidden_AD, *arguments, **more)
        return torch.where(torch.rand(len(ids_A)) < 0.5, ids_A, ids_A + 1)

    monkeypatch.setattr(heldout_module, "greedy_ids", first_token_given)


def _only_those_that_can_be_given(monkeypatch):
    make = samples_module.make_references
    monkeypatch.setattr(
        samples_module, "make_references", lambda answered, **more: make(answered, **more | {"prompts": len(answered)})
    )


MISTAKES = [
    _without_the_end,
    _one_place_late,
    _one_right_token_is_enough,
    _only_those_that_can_be_given,
]


@pytest.mark.parametrize("plant", MISTAKES, ids=lambda plant: plant.__name__.strip("_"))
def test_planted_mistakes_are_seen(config, student, wanted, plant, monkeypatch):
    plant(monkeypatch)
    assert measured(config, student[0]) != pytest.approx(wanted, abs=1e-9)


def test_prompts_without_reference_answers_are_answered_and_not_compared(config, student, tmp_path):
    (tmp_path / "bare.jsonl").write_text('{"prompt": "1+1"}\n')
    source = config.data.heldout.model_copy(update={"path": tmp_path / "bare.jsonl"})
    bare = config.model_copy(update={"data": config.data.model_copy(update={"heldout": source})})
    measured = heldout_references(bare, config.sft, ALONE).measure(student[0])
    assert measured.keys() == {"heldout__answer_tokens", "heldout__entropy", "heldout__busy_s"}
    never = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"every_steps": None})})
    assert heldout_references(never, config.sft, ALONE) is None


@pytest.mark.parametrize(("every", "steps"), [(None, [0, 3, 6]), (2, [0, 2, 4, 6]), (3, [0, 3, 6]), (4, [0, 4, 6])])
def test_it_is_measured_at_both_ends_and_on_the_way(tmp_path, monkeypatch, every, steps):
    """Two epochs of three steps."""
    seen = []

    class Log:
        def log(self, step, **values):
            if "heldout__exact_match" in values:
                seen.append((step, values["train__epoch"]))

    monkeypatch.setattr(Heldout, "measure", lambda self, model, mesh: {"heldout__exact_match": 0.0})
    model = load_decoder(TEACHER, dtype=torch.float32, device=CPU)
    fit(
        model,
        make_samples([5, 5, 5], vocab_size=model.config.vocab_size),
        Objective(),
        TrainConfig(epochs=2, pack_tokens=8),
        mesh=ALONE,
        epochs=(0, 2),
        seed=0,
        checkpoints=tmp_path / "checkpoints",
        metrics=Log(),
        heldout=Heldout(),
        measure_every=every,
    )
    assert seen == [(step, pytest.approx(step / 3)) for step in steps]
