"""`npd eval --benchmarks` against lm-eval's own command: the same small model, the same questions, the same scores.

With requirements-eval.txt; launch/test.sh installs it beside vLLM. The model has random weights and writes mostly
digits and a stop text, so that filters find something and the stop is seen; half of the reference answers
are what it says, so that scores lie between 0 and 1 and move when anything about the prompt or the stop does.
Rows are in the shape of the hub's, made here. MBPP and HumanEval: test_code_benchmarks.py.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
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

import datasets
from hub import npd_eval_from_hub
from lm_eval_command import GROUPS, lm_eval_command, scores_of, subjects

from npd_ascend.__main__ import main
from npd_ascend.evaluate import engine_lm, harness
from npd_ascend.evaluate.benchmarks import BENCHMARKS
from npd_ascend.rollout.hf_engine import HfEngine

torch.set_num_threads(1)
QUESTIONS, NEW_TOKENS = 24, 24
ASKED = ("gsm8k", "drop", "cluewsc", "math500", "gpqa_diamond", "ifeval")  # beside those with many subjects
SHOTS = {"mmlu": 1, "math500": 4}  # else none
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(
    folder: Path, likely: Sequence[str] = (*"0123456789 .", "Question:", "<|im_end|>"), seed: int = 7
) -> Path:
    """A token per byte and per text of several in `likely`, whose tokens come more often."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: id_ for id_, token in enumerate(special + letters)}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens(special)
    plain.add_tokens([text for text in likely if len(text) > 1 and text not in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096, "bos_token_id": None}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1}  # of 32, the smallest that vLLM takes on CPU
    model = make_hf_model("llama", seed=seed, **shape)
    with torch.no_grad():
        for letters_of_answers in likely:
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
    rows: dict[str, list[dict]] = {name: [] for name in ASKED}
    for i in range(QUESTIONS):
        known = said and i % 2 == 0
        number = said["gsm8k"][i] if known else f"{i}"
        rows["gsm8k"].append({"question": f"What is {i * 7} and {i * i}?", "answer": f"We add.\n#### {number}"})
        span = said["drop"][i].strip() or "nothing" if known else f"team {i}"
        empty = {"number": "", "date": {"day": "", "month": "", "year": ""}}
        rows["drop"].append(
            {
                "query_id": f"q{i}",
                "passage": f"Team {i} won {i + 3} games to {i}.",
                "question": "Who won?",
                "answer": empty | {"spans": [span]},
                "validated_answers": {"number": [""], "date": [empty["date"]], "spans": [[f"team {i} won"]]},
            }
        )
        target = {"span1_text": f"甲{i}", "span2_text": "他", "span1_index": 0, "span2_index": 3}
        rows["cluewsc"].append(
            {"text": f"甲{i}说他来了。", "target": target, "label": ["true", "false"][i * i % 3 % 2]}
        )
        numbers = re.findall(r"\d+", said["math500"][i]) if known else []
        rows["math500"].append(
            {
                "problem": f"What is ${i} + {i * i}$?",
                "solution": f"It is $\\boxed{{{numbers[-1] if numbers else i}}}$.",
                "answer": "",
                "subject": "Algebra",
                "level": 1,
                "unique_id": f"test/algebra/{i}.json",
            }
        )
        # the filter drops full stops and takes the last of equal choices, so it depends on their order which is right
        right = "2479"[i % 4]
        wrong = {f"Incorrect Answer {n}": text for n, text in enumerate((f"{right}.", "none", "all"), 1)}
        rows["gpqa_diamond"].append({"Question": f"How high is hill {i}?", "Correct Answer": right} | wrong)
        # two that hold of some answers and split no sentences, for which NLTK's data would be needed
        words = {"num_words": i % 12 + 1, "relation": "at least"}
        rows["ifeval"].append(
            {
                "key": i,
                "prompt": f"Write about hill {i} in at least {i % 12 + 1} words, without a comma.",
                "instruction_id_list": ["length_constraints:number_words", "punctuation:no_comma"],
                "kwargs": [words, dict.fromkeys(words)],
            }
        )
    data = {name: write_lines(folder / f"{name}.jsonl", lines) for name, lines in rows.items()}
    return data | {name: make_subjects(folder / name, name) for name in GROUPS}


def make_subjects(folder: Path, name: str) -> Path:
    """A folder as the hub's, with a configuration per subject; a question and an example in each."""
    folder.mkdir()
    configurations = []
    for i, subject in enumerate(sorted(subjects(name).values())):
        text, choices = f"Which is right of {subject}, number {i}?", [f"{i + n} {subject}" for n in range(4)]
        lettered = dict(zip("ABCD", choices, strict=True)) | {"id": i, "explanation": ""}
        row = {
            "mmlu": {"question": text, "subject": subject, "choices": choices, "answer": i % 4},
            "cmmlu": {"Question": text, "Answer": "ABCD"[i % 4]} | lettered,
            "ceval": {"question": text, "answer": "ABCD"[i % 4]} | lettered,
        }[name]
        files = []
        for split in (GROUPS[name][1], "dev"):
            write_lines(folder / f"{subject}-{split}.jsonl", [row])
            files.append({"split": split, "path": f"{subject}-{split}.jsonl"})
        configurations.append({"config_name": subject, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configurations})}---\n")
    return folder


def npd_settings(folder: Path, model: Path, data: dict[str, Path]) -> dict:
    return {
        "folder": str(folder),
        "device": {"threads": 1},
        "model": {"path": str(model), "batch_size": 8, "kv_cache_gib": 0.1},
        "benchmarks": {
            name: {"data": str(place), "shots": SHOTS.get(name, 0)}
            | ({} if BENCHMARKS[name].metric == "acc" else {"max_new_tokens": NEW_TOKENS})
            for name, place in data.items()
        },
        "run_code_of": [name for name in data if BENCHMARKS[name].runs_code],
    }


def npd_eval(folder: Path, model: Path, data: dict[str, Path], **changes) -> dict[str, list[float]]:
    """Scores of every question by `npd eval --benchmarks`."""
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(npd_settings(folder, model, data) | changes))
    assert main(["eval", "--benchmarks", str(path)]) == 0
    return scores_of(folder)


def npd_eval_command(settings: dict) -> None:
    """In a process of its own, as it is typed."""
    path = Path(settings["folder"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "npd_ascend", "eval", "--benchmarks", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr


def said_by(folder: Path, name: str) -> list[str]:
    return [row["answer"] for row in json.loads((folder / name / "questions-0.json").read_text())]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(folder, model, data, scores of lm-eval's own command)."""
    folder = tmp_path_factory.mktemp("harness")
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # of the processes that are started here
    datasets.config.HF_DATASETS_CACHE = folder / "hf"
    # IF-Eval's task would fetch it; what is asked here does not need it
    (folder / "nltk" / "tokenizers" / "punkt_tab").mkdir(parents=True)
    os.environ["NLTK_DATA"] = str(folder / "nltk")
    model = make_model(folder / "model")
    first = make_data(folder / "first", {})
    quoted = ("gsm8k", "drop", "math500")
    npd_eval(folder / "said", model, {name: first[name] for name in quoted})
    data = make_data(folder / "data", {name: said_by(folder / "said", name) for name in quoted})
    scores = lm_eval_command(folder / "theirs", model, data, SHOTS, new_tokens=NEW_TOKENS)
    assert all(0.1 < sum(each) / len(each) < 0.9 for each in scores.values()), (
        scores
    )  # 0 and 1 would agree by themselves
    return folder, model, data, scores


def test_the_same_scores_as_lm_evals_own_command(theirs):
    folder, model, data, scores = theirs
    assert npd_eval(folder / "ours", model, data) == scores  # question by question


def test_a_prompt_without_the_chat_template_shows(theirs, monkeypatch):
    folder, model, data, scores = theirs
    plain = lambda self, turns, add_generation_prompt=True: "".join(turn["content"] for turn in turns)  # noqa: E731
    monkeypatch.setattr(engine_lm.EngineLM, "apply_chat_template", plain)
    asked = ("mmlu", "gsm8k", "drop", "ifeval")
    wrong = npd_eval(folder / "no_template", model, {name: data[name] for name in asked})
    assert all(wrong[name] != scores[name] for name in asked), (wrong, scores)


def test_other_examples_and_other_choices_show(theirs, monkeypatch):
    """Those before the question, and their order in GPQA, which lm-eval shuffles when it loads."""
    folder, model, data, scores = theirs
    monkeypatch.setattr(sys.modules[__name__], "SHOTS", {})
    seed = harness.random.seed
    monkeypatch.setattr(harness.random, "seed", lambda number: seed(number + 1))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "hf_again")  # where it is not yet shuffled
    asked = ("mmlu", "math500", "gpqa_diamond")
    wrong = npd_eval(folder / "no_examples", model, {name: data[name] for name in asked})
    assert all(wrong[name] != scores[name] for name in asked), (wrong, scores)


@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed; launch/test.sh has it here")
def test_vllm_gives_the_scores_of_transformers(theirs):
    """MATH-500, as in the recipe, with several answers. MBPP and HumanEval: test_code_benchmarks.py."""
    folder, model, data, scores = theirs
    lines = data["math500"].read_text().splitlines()
    (folder / "twice.jsonl").write_text("\n".join([*lines, lines[0]]))
    settings = npd_settings(folder / "vllm", model, data | {"math500": folder / "twice.jsonl"})
    settings["model"]["engine"] = "vllm"
    settings["benchmarks"]["math500"] |= {"samples": 2, "temperature": 1.0}
    npd_eval_command(settings)
    greedy = {name: score for name, score in scores_of(folder / "vllm").items() if name != "math500"}
    assert greedy == {name: score for name, score in scores.items() if name != "math500"}
    assert said_by(folder / "vllm", "gsm8k") == said_by(folder / "ours", "gsm8k")

    rows = [json.loads((folder / "vllm" / "math500" / f"questions-{i}.json").read_text()) for i in (0, 1)]
    first, second = ([row["answer"] for row in sample] for sample in rows)
    assert sum(one != other for one, other in zip(first, second, strict=True)) > QUESTIONS / 4
    assert (first[-1], second[-1]) == (first[0], second[0])  # by the question and the sample alone
    found = json.loads((folder / "vllm" / "results.json").read_text())["benchmarks"]["math500"]
    questions, mean = QUESTIONS + 1, sum(row["score"] for sample in rows for row in sample) / (2 * QUESTIONS + 2)
    assert 0 < mean < 1
    assert found["score"] == pytest.approx(mean)
    for end in found["interval_95"]:  # Wilson's, over the questions and not over the answers
        assert abs(end - mean) == pytest.approx(1.96 * (end * (1 - end) / questions) ** 0.5, rel=1e-3)


def test_from_the_hub_it_is_the_same(theirs):
    """As datasets fetches it: another package's client, over HTTP, from the names that the hub has."""
    folder, model, data, scores = theirs
    (folder / "online").mkdir()
    npd_eval_from_hub(folder / "online", npd_settings(folder / "online" / "scores", model, data), data)
    assert scores_of(folder / "online" / "scores") == scores


def test_a_wrong_stop_shows(theirs, monkeypatch):
    folder, model, data, scores = theirs
    monkeypatch.setattr(engine_lm, "postprocess_generated_text", lambda text, stop, think: text)
    wrong = npd_eval(folder / "no_stop", model, {"gsm8k": data["gsm8k"]})
    assert wrong["gsm8k"] != scores["gsm8k"]


def count_batches(patch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[int]:
    """The questions of every batch that HfEngine is asked; Ctrl-C where batch number `stop_at` begins."""
    generate, asked = HfEngine.generate, []

    def counted(self, requests, sampling):
        if len(asked) == stop_at:
            raise KeyboardInterrupt
        asked.append(len(requests))
        return generate(self, requests, sampling)

    patch.setattr(HfEngine, "generate", counted)
    return asked


def test_killed_and_started_again_asks_only_what_is_left(theirs, monkeypatch):
    folder, model, data, scores = theirs
    only = {"gsm8k": data["gsm8k"]}
    with monkeypatch.context() as patch:
        begun = count_batches(patch, stop_at=2)
        with pytest.raises(AssertionError):  # exit code 130
            npd_eval(folder / "killed", model, only)
        assert begun == [8, 8]
    asked = count_batches(monkeypatch)
    assert npd_eval(folder / "killed", model, only)["gsm8k"] == scores["gsm8k"]
    assert asked == [8]
    assert npd_eval(folder / "killed", model, only)["gsm8k"] == scores["gsm8k"]
    assert asked == [8]
    assert said_by(folder / "killed", "gsm8k") == said_by(folder / "ours", "gsm8k")


def test_samples_differ_and_are_averaged(theirs, monkeypatch):
    """And they are the same in another process, and where one was stopped among the second ones."""
    folder, model, data, _ = theirs
    sampled = {"data": str(data["gsm8k"]), "shots": 0, "max_new_tokens": 8, "samples": 2, "temperature": 1.0}
    settings = npd_settings(folder / "again", model, data) | {"benchmarks": {"gsm8k": sampled | {"questions": 16}}}
    npd_eval(folder / "sampled", model, data, benchmarks=settings["benchmarks"])
    npd_eval_command(settings)
    score = json.loads((folder / "sampled" / "results.json").read_text())["benchmarks"]["gsm8k"]["score"]
    rows = [json.loads((folder / "sampled" / "gsm8k" / f"questions-{i}.json").read_text()) for i in (0, 1)]
    assert [row["answer"] for row in rows[0]] != [row["answer"] for row in rows[1]]
    assert score == sum(row["score"] for sample in rows for row in sample) / 32

    with monkeypatch.context() as patch:
        count_batches(patch, stop_at=3)
        with pytest.raises(AssertionError):  # exit code 130
            npd_eval(folder / "stopped", model, data, benchmarks=settings["benchmarks"])
    asked = count_batches(monkeypatch)
    npd_eval(folder / "stopped", model, data, benchmarks=settings["benchmarks"])
    assert asked == [8]
    for name in ("again", "stopped"):
        for i, sample in enumerate(rows):
            assert json.loads((folder / name / "gsm8k" / f"questions-{i}.json").read_text()) == sample


def test_another_folder_of_one_name_is_read_and_changed_rows_are_refused(theirs, tmp_path, capsys):
    """datasets keeps what it read under the folder's name."""
    _, model, data, scores = theirs
    rows = [json.loads(line) for line in data["cluewsc"].read_text().splitlines()]
    other = [row | {"label": {"true": "false", "false": "true"}[row["label"]]} for row in rows]

    def folder(place: Path, lines: list[dict]) -> Path:
        place.mkdir(parents=True)
        files = [{"split": split, "path": f"{split}.jsonl"} for split in ("train", "validation")]
        for file in files:
            write_lines(place / file["path"], lines)
        head = {"configs": [{"config_name": "cluewsc2020", "data_files": files}]}
        (place / "README.md").write_text(f"---\n{yaml.safe_dump(head)}---\n")
        return place

    right, wrong = folder(tmp_path / "a" / "clue", rows), folder(tmp_path / "b" / "clue", other)
    assert npd_eval(tmp_path / "right", model, {"cluewsc": right})["cluewsc"] == scores["cluewsc"]
    assert npd_eval(tmp_path / "wrong", model, {"cluewsc": wrong})["cluewsc"] == [1 - s for s in scores["cluewsc"]]
    shutil.copy(wrong / "validation.jsonl", right)
    with pytest.raises(AssertionError):
        npd_eval(tmp_path / "right", model, {"cluewsc": right})
    assert "the answers there were given with another data" in capsys.readouterr().err


def test_data_that_cannot_be_had_are_said_in_one_line(theirs, tmp_path, capsys):
    settings = {"folder": str(tmp_path / "out"), "model": {"path": str(theirs[1])}}
    settings["benchmarks"] = {"gsm8k": {"shots": 0}}  # from the hub, which is out of reach here
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(settings))
    assert main(["eval", "--benchmarks", str(tmp_path / "eval.yaml")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("npd eval: benchmarks.gsm8k: GSM8K from the hub's data set cannot be loaded")
    assert "set benchmarks.gsm8k.data to a copy" in said
