"""Canaries: fixed tokens by trainer and generator, and one tokenizer for all of a run."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import CONFIGS, FAMILIES, make_hf_model

from npd_ascend.__main__ import main
from npd_ascend.errors import UserError
from npd_ascend.metrics import read_metrics
from npd_ascend.model.load import load_decoder
from npd_ascend.parallel.plan import cut_model
from npd_ascend.records import Prompt
from npd_ascend.rollout.hf_engine import HfEngine
from npd_ascend.trainer.canary import make_probes
from npd_ascend.weights.canary import Probe, compare, read_probes, write_probes

CPU = torch.device("cpu")
PROMPTS = [
    Prompt(prompt_id=f"p{i}", text="", token_ids=tuple(3 + (i * 7 + j) % 50 for j in range(1 + 5 * i)))
    for i in range(6)
]


def make_folder(folder, family, seed=0, **changes):
    make_hf_model(family, seed, **changes).save_pretrained(folder)
    return folder


def probes_of(folder):
    return make_probes(load_decoder(folder, dtype=torch.float32, device=CPU), PROMPTS, "chunked")


def probes_on_a_rank(mesh, folder):
    model = load_decoder(folder, dtype=torch.float32, device=CPU, cut=lambda decoder: cut_model(decoder, mesh))
    return make_probes(model, PROMPTS, "chunked", mesh)


def difference(probes, folder):
    engine = HfEngine(dtype=torch.float32, device=CPU, eos_id=2, pad_id=0, vocab_size=61)
    engine.load_weights(folder)
    found = engine.next_logprobs([probe.context for probe in probes], [probe.next_id for probe in probes])
    return compare(probes, found, 2e-3, folder)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_same_weights_pass_and_others_do_not(family, tmp_path):
    folder = make_folder(tmp_path / "a", family)
    probes = probes_of(folder)
    assert [len(probe.context) for probe in probes] == [13, 25, 10, 20, 8, 15, 5, 10]
    assert all(PROMPTS[5].token_ids[len(p.context)] == p.next_id for p in probes[:2])
    assert difference(probes, folder) < 1e-5
    with pytest.raises(UserError, match="the generator does not have these weights") as error:
        difference(probes, make_folder(tmp_path / "b", family, seed=1))
    assert "\n" not in str(error.value)


def test_another_rotary_base_or_a_lost_bias_is_seen(tmp_path):
    folder = make_folder(tmp_path / "a", "pangu")
    probes = probes_of(folder)
    config = json.loads((folder / "config.json").read_text())
    other = make_folder(tmp_path / "b", "pangu")
    (other / "config.json").write_text(
        json.dumps(config | {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}})
    )
    with pytest.raises(UserError, match="does not have these weights"):
        difference(probes, other)
    (other / "config.json").write_text(json.dumps(config | {"attention_bias": False}))
    with pytest.raises(UserError, match="does not have these weights"):
        difference(probes, other)


@pytest.mark.parametrize("layout", [(2, 1, False), (2, 2, True), (4, 1, True)], ids=str)
def test_every_layout_says_the_same(ranks, layout, tmp_path):
    folder = make_folder(tmp_path / "a", "pangu")
    wanted = probes_of(folder)
    for probes in ranks.run(probes_on_a_rank, layout, folder):
        assert [(p.context, p.next_id) for p in probes] == [(p.context, p.next_id) for p in wanted]
        assert max(abs(p.logprob - q.logprob) for p, q in zip(probes, wanted, strict=True)) < 1e-4


def test_no_number_is_no_agreement(tmp_path):
    with pytest.raises(UserError, match="does not have these weights"):
        compare([Probe((1, 2), 3, -1.0)], np.array([np.nan], np.float32), 2e-3, tmp_path)


def test_probes_are_kept_with_the_weights(tmp_path):
    assert read_probes(tmp_path) == []
    probes = [Probe((1, 2), 3, -1.25), Probe((4,), 5, -0.5)]
    write_probes(probes, tmp_path)
    assert read_probes(tmp_path) == probes


def test_a_generator_with_other_weights_ends_the_run_before_it_generates(tmp_path, capsys):
    run = tmp_path / "run"
    settings = ["data.gold.count=40", "data.prompts.count=20", "data.heldout.count=10", "sft.epochs=1"]
    config = ["--config", str(CONFIGS / "addition_cpu.yaml"), f"run.folder={run}", "device.threads=1", *settings]
    assert main(["sft", *config]) == 0
    file = run / "weights" / "v0" / "canary.json"
    published = file.read_text()
    file.write_text(json.dumps([row | {"logprob": row["logprob"] - 0.5} for row in json.loads(published)]))
    assert main(["rollout", "--run", str(run)]) == 2
    assert "its log-probs are 0.5 nats from the trainer's on average" in capsys.readouterr().err
    assert not (run / "stream" / "manifest.jsonl").exists()
    file.write_text(published)
    assert main(["rollout", "--run", str(run)]) == 0
    (canary,) = [row["rollout/canary"] for row in read_metrics(run) if "rollout/canary" in row]
    assert canary < 1e-4


@pytest.mark.parametrize(("trains", "generates"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_two_types_of_numbers_differ_by_no_more_than_the_coarser_rounds(trains, generates, tmp_path):
    settings = ["data.gold.count=40", "data.prompts.count=20", "data.heldout.count=10", "sft.epochs=1"]
    settings += ["device.threads=1", f"student.dtype={trains}", f"rollout.dtype={generates}"]
    run = tmp_path / "run"
    assert main(["sft", "--config", str(CONFIGS / "addition_cpu.yaml"), f"run.folder={run}", *settings]) == 0
    assert main(["rollout", "--run", str(run)]) == 0
    (canary,) = [row["rollout/canary"] for row in read_metrics(run) if "rollout/canary" in row]
    assert 2e-3 < canary < 0.1  # past what float32 alone would explain


def as_file(folder, rows):
    folder.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_other_rows_than_the_runs_end_whoever_finds_them(tmp_path, capsys):
    """A prompt id is a line of its file: in another order it would be another question."""
    run, rows = tmp_path / "run", [{"prompt": f"{a}+{a}", "answer": str(2 * a)} for a in range(100, 130)]
    file = as_file(tmp_path / "sums.jsonl", rows)
    prompts = f"data.prompts={{kind: jsonl, path: {file}, count: 20}}"
    words = ["--config", str(CONFIGS / "addition_cpu.yaml"), f"run.folder={run}", prompts]
    words += ["data.gold.count=40", "data.heldout.count=10", "sft.epochs=1", "device.threads=1"]
    assert main(["sft", *words]) == 0
    as_file(file, rows[::-1])
    for command in (["rollout", "--run", run], ["score", "--run", run], ["run", "--dry-run", "--run", run]):
        assert main(list(map(str, command))) == 2
        assert f"{file}: data.prompts: its rows are not those that this run began with" in capsys.readouterr().err
    assert not (run / "stream" / "manifest.jsonl").exists()
    as_file(file, [*rows, {"prompt": "999+1"}])  # behind those that are taken
    kept = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps(kept | {"problems": "0" * 64}))  # of a stage that this run has not
    assert main(["rollout", "--run", str(run)]) == 0


def swap_digits(folder):
    """4 and 5 change their ids, in the tokenizer alone."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["4"], vocabulary["5"] = vocabulary["5"], vocabulary["4"]
    file.write_text(json.dumps(tokenizer))


def test_another_tokenizer_than_the_runs_ends_whoever_finds_it(tmp_path, capsys):
    run, models = tmp_path / "run", tmp_path / "models"
    shutil.copytree(CONFIGS / "addition", models)
    settings = ["data.gold.count=40", "data.prompts.count=20", "data.heldout.count=10", "sft.epochs=1"]
    settings += [f"student.path={models / 'student'}", f"teacher.path={models / 'teacher'}", "device.threads=1"]
    assert main(["sft", "--config", str(CONFIGS / "addition_cpu.yaml"), f"run.folder={run}", *settings]) == 0
    swap_digits(models / "student")
    for stage in ("rollout", "score", "distill"):
        assert main([stage, "--run", str(run)]) == 2
        assert "its tokenizer is not the one that this run began with" in capsys.readouterr().err
    assert not (run / "stream" / "manifest.jsonl").exists()
    swap_digits(models / "student")
    assert main(["rollout", "--run", str(run)]) == 0
    swap_digits(models / "teacher")
    assert main(["score", "--run", str(run)]) == 2
    assert "teacher and student do not share a vocabulary: token '4' is" in capsys.readouterr().err
    swap_digits(models / "teacher")
    assert main(["score", "--run", str(run)]) == 0
