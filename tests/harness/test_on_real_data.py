"""`npd eval --benchmarks` against lm-eval's own command on the benchmarks' own data, for who has them.

    NPD_EVAL_DATA=FOLDER NPD_EVAL_MODEL=MODEL .venv-eval/bin/python -m pytest -s tests/harness/test_on_real_data.py

FOLDER has any of gsm8k.jsonl, math500.jsonl, ifeval.jsonl, drop.jsonl, gpqa_diamond.jsonl, mbpp.jsonl and
humaneval.jsonl, with the rows of the split that is asked, and for the last two the folder code_eval of
huggingface/evaluate's metrics. MODEL is a Hugging Face folder. These two execute what the model writes, with your
rights. NPD_EVAL_QUESTIONS: of each, 24 if not said. The reference answers are given for all questions, in the place of
a model's (-k reference), and the table in docs/eval.md is what that prints.
"""

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

if find_spec("lm_eval") is None or "NPD_EVAL_DATA" not in os.environ:
    pytest.skip("needs lm_eval, NPD_EVAL_DATA and NPD_EVAL_MODEL", allow_module_level=True)

from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
from lm_eval_command import lm_eval_command, scores_of

from npd_ascend.__main__ import main
from npd_ascend.evaluate.benchmarks import BENCHMARKS
from npd_ascend.evaluate.engine_lm import EngineLM
from npd_ascend.evaluate.harness import Harness
from npd_ascend.evaluate.settings import load_settings
from npd_ascend.tokenizer import ChatTokenizer

SHOTS = {"math500": 4, "mbpp": 3}  # which stand in the tasks
NEW_TOKENS = 256
QUESTIONS = int(os.environ.get("NPD_EVAL_QUESTIONS", "24"))
FOLDER, MODEL = (Path(os.environ[name]).absolute() for name in ("NPD_EVAL_DATA", "NPD_EVAL_MODEL"))
DATA = {name: FOLDER / f"{name}.jsonl" for name in BENCHMARKS if (FOLDER / f"{name}.jsonl").exists()}


FENCE = "\n```"
REFERENCES = {
    "gsm8k": lambda row: row["answer"],
    "math500": lambda row: row["solution"],
    "drop": lambda row: ", ".join(row["answers"][0]),
    "gpqa_diamond": lambda row: f"The answer is {row['answer']}.",
    "mbpp": lambda row: row["code"] + FENCE,
    "humaneval": lambda row: row["canonical_solution"] + FENCE,
}
OF_LM_EVAL = {
    "mbpp": "extract_code",
    "drop": "none",
    "gpqa_diamond": "flexible-extract",
}  # the filters that ours replace


class Reference(EngineLM):
    """A model that knows."""

    def __init__(self, name: str):
        super().__init__(None, ChatTokenizer(MODEL), prompt_suffix="", batch_size=8, max_tokens=8192, seed=0)
        self._name = name

    def generate_until(self, requests, disable_tqdm=False):
        return [
            postprocess_generated_text(
                REFERENCES[self._name](request.doc), handle_stop_sequences(request.args[1].get("until"), eos=None), None
            )
            for request in requests
        ]


@pytest.mark.parametrize("name", sorted(REFERENCES.keys() & DATA.keys()))
def test_reference_answers_are_right(name, tmp_path, monkeypatch):
    monkeypatch.chdir(FOLDER)
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_ALLOW_CODE_EVAL"):
        monkeypatch.setenv(variable, "1")
    benchmarks = {name: {"data": str(DATA[name]), "shots": SHOTS.get(name, 0)}}
    run_code_of = [name] if BENCHMARKS[name].runs_code else []
    settings = {"folder": str(tmp_path), "model": {"path": str(MODEL)}, "benchmarks": benchmarks}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(settings | {"run_code_of": run_code_of}))
    loaded = load_settings(tmp_path / "eval.yaml", [])

    def mean() -> float:
        rows = Harness(loaded, {}).ask(name, getattr(loaded.benchmarks, name), Reference(name))
        return 100 * sum(row["score"] for row in rows) / len(rows)

    ours = mean()
    if name in OF_LM_EVAL:
        as_it_comes = replace(BENCHMARKS[name], filter=OF_LM_EVAL[name], changes={})
        monkeypatch.setitem(BENCHMARKS, name, as_it_comes)
        print(f"{name}: {mean():.2f} by lm-eval's filter")
    print(f"{name}: {ours:.2f}")
    assert ours > 95


def test_the_same_scores_as_lm_evals_own_command(tmp_path, monkeypatch):
    monkeypatch.chdir(FOLDER)  # where the package evaluate looks for code_eval before it asks the hub
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_ALLOW_CODE_EVAL"):
        monkeypatch.setenv(name, "1")
    settings = {
        "folder": str(tmp_path / "ours"),
        "model": {"path": str(MODEL), "batch_size": 8},
        "run_code_of": [name for name in DATA if BENCHMARKS[name].runs_code],
        "benchmarks": {
            name: {"data": str(file), "shots": SHOTS.get(name, 0), "questions": QUESTIONS, "max_new_tokens": NEW_TOKENS}
            for name, file in DATA.items()
        },
    }
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(settings))
    assert main(["eval", "--benchmarks", str(tmp_path / "eval.yaml")]) == 0
    more = ["--limit", str(QUESTIONS), "--confirm_run_unsafe_code"]
    theirs = lm_eval_command(tmp_path / "theirs", MODEL, DATA, SHOTS, *more, new_tokens=NEW_TOKENS, timeout_s=36_000)
    ours = scores_of(tmp_path / "ours")
    for name, scores in theirs.items():
        print(f"{name}: {sum(scores):g} of {len(scores)} by lm-eval, {sum(ours[name]):g} of {len(ours[name])} by npd")
    assert ours == theirs
    for name, scores in theirs.items():
        assert 0 < sum(scores) < len(scores), f"{name}: all alike, which would agree by itself; take another model"
