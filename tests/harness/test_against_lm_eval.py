"""`npd eval --benchmarks` against lm-eval's own command: the same small model, the same questions, the same scores.

In an environment of its own (requirements-eval.txt); launch/test.sh makes it. The model has random weights and writes
mostly digits and full stops, so that filters find numbers and stop texts come up; half of the reference answers are
what it says, so that scores lie between 0 and 1 and move when anything about the prompt or the stop does.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_hf_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

if find_spec("lm_eval") is None:
    pytest.skip(
        "lm_eval is not installed; launch/test.sh runs this in an environment of its own", allow_module_level=True
    )

from lm_eval import tasks

from npd_ascend.__main__ import main
from npd_ascend.evaluate import engine_lm
from npd_ascend.evaluate.benchmarks import TASKS
from npd_ascend.rollout.hf_engine import HfEngine

torch.set_num_threads(1)
QUESTIONS, NEW_TOKENS = 24, 24
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(folder: Path) -> Path:
    """A token per byte; digits, the full stop and the end of a turn are likelier than the rest."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: id_ for id_, token in enumerate(special + letters)}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    shape = {"vocab_size": len(vocabulary), "max_position_embeddings": 1024, "bos_token_id": None}
    model = make_hf_model("llama", seed=3, **shape)
    with torch.no_grad():
        for letters_of_answers in [*"0123456789 .", "<|im_end|>"]:
            model.lm_head.weight[tokenizer.encode(letters_of_answers, add_special_tokens=False)] *= 6
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    return folder


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def make_data(folder: Path, said: dict[str, list[str]]) -> dict[str, Path]:
    """Questions of every shape; every second reference answer is what the model said, if it is known."""
    folder.mkdir()
    gsm8k, drop, cluewsc = [], [], []
    for i in range(QUESTIONS):
        known = said and i % 2 == 0
        number = said["gsm8k"][i] if known else f"{i}"
        gsm8k.append({"question": f"What is {i * 7} and {i * i}?", "answer": f"We add.\n#### {number}"})
        span = said["drop"][i].strip() or "nothing" if known else f"team {i}"
        empty = {"number": "", "date": {"day": "", "month": "", "year": ""}}
        drop.append(
            {
                "query_id": f"q{i}",
                "passage": f"Team {i} won {i + 3} games to {i}.",
                "question": "Who won?",
                "answer": empty | {"spans": [span]},
                "validated_answers": {"number": [""], "date": [empty["date"]], "spans": [[f"team {i} won"]]},
            }
        )
        target = {"span1_text": f"甲{i}", "span2_text": "他", "span1_index": 0, "span2_index": 3}
        cluewsc.append({"text": f"甲{i}说他来了。", "target": target, "label": ["true", "false"][i * i % 3 % 2]})
    rows = {"gsm8k": gsm8k, "drop": drop, "cluewsc": cluewsc}
    return {name: write_lines(folder / f"{name}.jsonl", lines) for name, lines in rows.items()}


def npd_eval(folder: Path, model: Path, data: dict[str, Path], **changes) -> dict[str, float]:
    """Scores of `npd eval --benchmarks` by benchmark."""
    generated = {"shots": 0, "max_new_tokens": NEW_TOKENS}
    settings = {
        "folder": str(folder),
        "device": {"threads": 1},
        "model": {"path": str(model), "batch_size": 8},
        "benchmarks": {
            name: {"data": str(file)} | (generated if name != "cluewsc" else {"shots": 0})
            for name, file in data.items()
        },
    }
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings | changes))
    assert main(["eval", "--benchmarks", str(path)]) == 0
    results = json.loads((folder / "results.json").read_text())["benchmarks"]
    return {name: result["score"] for name, result in results.items()}


def said_by(folder: Path, name: str) -> list[str]:
    return [row["answer"] for row in json.loads((folder / name / "questions-0.json").read_text())]


def lm_eval_command(folder: Path, model: Path, data: dict[str, Path]) -> dict[str, float]:
    """Scores of `lm-eval run --model hf` on its own tasks, of which only where the data lie is changed."""
    originals = Path(tasks.__file__).parent
    bases = {
        "gsm8k": (originals / "gsm8k" / "gsm8k.yaml", "test"),
        "drop": (originals / "drop" / "default.yaml", "validation"),
        "cluewsc": (TASKS / "cluewsc.yaml", "validation"),
    }
    (folder / "tasks").mkdir(parents=True)
    for name, (base, split) in bases.items():
        local = {
            "include": str(base),
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(data[name])}},
            "training_split": None,
            "fewshot_split": None,
        }
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(local))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "8"]
    command += ["--model_args", f"pretrained={model},dtype=float32", "--include_path", str(folder / "tasks")]
    command += ["--tasks", *(f"local_{name}" for name in bases), "--apply_chat_template", "--num_fewshot", "0"]
    command += ["--gen_kwargs", f"max_gen_toks={NEW_TOKENS}", "--output_path", str(folder / "out")]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=600)
    (file,) = (folder / "out").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    metrics = {"gsm8k": "exact_match,flexible-extract", "drop": "f1,none", "cluewsc": "acc,none"}
    return {name: results[f"local_{name}"][metric] for name, metric in metrics.items()}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(folder, model, data, scores of lm-eval's own command)."""
    folder = tmp_path_factory.mktemp("harness")
    os.environ |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    model = make_model(folder / "model")
    first = make_data(folder / "first", {})
    npd_eval(folder / "said", model, {name: first[name] for name in ("gsm8k", "drop")})
    data = make_data(folder / "data", {name: said_by(folder / "said", name) for name in ("gsm8k", "drop")})
    scores = lm_eval_command(folder / "theirs", model, data)
    assert all(0.1 < score < 0.9 for score in scores.values()), scores  # 0 and 1 would agree by themselves
    return folder, model, data, scores


def test_the_same_scores_as_lm_evals_own_command(theirs):
    folder, model, data, scores = theirs
    assert npd_eval(folder / "ours", model, data) == scores


def test_a_prompt_without_the_chat_template_shows(theirs, monkeypatch):
    folder, model, data, scores = theirs
    plain = lambda self, turns, add_generation_prompt=True: "".join(turn["content"] for turn in turns)  # noqa: E731
    monkeypatch.setattr(engine_lm.EngineLM, "apply_chat_template", plain)
    wrong = npd_eval(folder / "no_template", model, data)
    assert all(wrong[name] != scores[name] for name in ("gsm8k", "drop")), (wrong, scores)


def test_a_wrong_stop_shows(theirs, monkeypatch):
    folder, model, data, scores = theirs
    monkeypatch.setattr(engine_lm, "postprocess_generated_text", lambda text, stop, think: text)
    wrong = npd_eval(folder / "no_stop", model, {"drop": data["drop"]})
    assert wrong["drop"] != scores["drop"]


def test_killed_and_started_again_asks_only_what_is_left(theirs, monkeypatch):
    folder, model, data, scores = theirs
    generate, asked = HfEngine.generate, []

    def interrupted(self, requests, sampling):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(requests))
        return generate(self, requests, sampling)

    only = {"gsm8k": data["gsm8k"]}
    with monkeypatch.context() as patch:
        patch.setattr(HfEngine, "generate", interrupted)
        with pytest.raises(AssertionError):  # exit code 130
            npd_eval(folder / "killed", model, only)
    asked.append(0)  # the third batch was asked for and not answered
    monkeypatch.setattr(HfEngine, "generate", lambda *args: asked.append(len(args[1])) or generate(*args))
    assert npd_eval(folder / "killed", model, only)["gsm8k"] == scores["gsm8k"]
    assert asked == [8, 8, 0, 8]
    assert npd_eval(folder / "killed", model, only)["gsm8k"] == scores["gsm8k"]
    assert asked == [8, 8, 0, 8]
    assert said_by(folder / "killed", "gsm8k") == said_by(folder / "ours", "gsm8k")


def test_samples_differ_and_are_averaged(theirs):
    folder, model, data, _ = theirs
    sampled = {"data": str(data["gsm8k"]), "shots": 0, "max_new_tokens": 8, "samples": 2, "temperature": 1.0}
    score = npd_eval(folder / "sampled", model, data, benchmarks={"gsm8k": sampled | {"questions": 8}})["gsm8k"]
    rows = [json.loads((folder / "sampled" / "gsm8k" / f"questions-{i}.json").read_text()) for i in (0, 1)]
    assert [row["answer"] for row in rows[0]] != [row["answer"] for row in rows[1]]
    assert score == sum(row["score"] for sample in rows for row in sample) / 16


def test_data_that_cannot_be_had_are_said_in_one_line(theirs, tmp_path, capsys):
    settings = {"folder": str(tmp_path / "out"), "model": {"path": str(theirs[1])}}
    settings["benchmarks"] = {"gsm8k": {"shots": 0}}  # from the hub, which is out of reach here
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(settings))
    assert main(["eval", "--benchmarks", str(tmp_path / "eval.yaml")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("npd eval: benchmarks.gsm8k: GSM8K from the hub's data set cannot be loaded")
    assert "set benchmarks.gsm8k.data to a copy" in said
