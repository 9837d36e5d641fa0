"""`npd eval --benchmarks` against lm-eval's own command on the benchmarks' own data, for who has them.

    NPD_EVAL_DATA=FOLDER NPD_EVAL_MODEL=MODEL .venv-eval/bin/python -m pytest -s tests/harness/test_on_real_data.py

FOLDER has any of gsm8k.jsonl, math500.jsonl, ifeval.jsonl, mbpp.jsonl and humaneval.jsonl, with the rows of the split
that is asked, and for the last two the folder code_eval of huggingface/evaluate's metrics. MODEL is a Hugging Face
folder. These two execute what the model writes, with your rights. NPD_EVAL_QUESTIONS: of each, 24 if not said.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

if find_spec("lm_eval") is None or "NPD_EVAL_DATA" not in os.environ:
    pytest.skip("needs lm_eval, NPD_EVAL_DATA and NPD_EVAL_MODEL", allow_module_level=True)

from lm_eval_command import lm_eval_command, scores_of

from npd_ascend.__main__ import main
from npd_ascend.evaluate.benchmarks import BENCHMARKS

SHOTS = {"math500": 4, "mbpp": 3}  # which stand in the tasks
NEW_TOKENS = 256
QUESTIONS = int(os.environ.get("NPD_EVAL_QUESTIONS", "24"))
FOLDER, MODEL = (Path(os.environ[name]).absolute() for name in ("NPD_EVAL_DATA", "NPD_EVAL_MODEL"))
DATA = {name: FOLDER / f"{name}.jsonl" for name in BENCHMARKS if (FOLDER / f"{name}.jsonl").exists()}


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
