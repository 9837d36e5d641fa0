"""What a model may write for a right answer, where the filter is ours: through lm-eval, without a model."""

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

if find_spec("lm_eval") is None:
    pytest.skip(
        "lm_eval is not installed; launch/test.sh runs this in an environment of its own", allow_module_level=True
    )

import datasets
from test_against_lm_eval import make_model, write_lines

from npd_ascend.evaluate.answers import AnswerFile
from npd_ascend.evaluate.engine_lm import EngineLM
from npd_ascend.evaluate.harness import Harness
from npd_ascend.evaluate.settings import load_settings
from npd_ascend.rollout.engine import Completion
from npd_ascend.tokenizer import ChatTokenizer

PROGRAM = "def double(n):\n    return 2 * n"
DATE = {"day": "", "month": "", "year": ""}
# what is said, and its score
MBPP = [
    (PROGRAM + "\n```", 1),
    (PROGRAM, 1),
    (f"```python\n{PROGRAM}\n```\nIt doubles.", 1),
    (f"\n{PROGRAM}\n```\nFor example:\n```python\ndouble(3)\n```", 1),
    ("def double(n):\n    return n\n```", 0),
    ("I cannot.", 0),
]
DROP = [
    ("3.5", 1),
    ("The answer is 3.5.", 1),
    ("Answer: 3.5\nIt stands in the first sentence.", 1),
    ("\n\n3.5", 1),
    ("3", 0),
]
DROP_SPAN = [("J. P. Losman", 1), ("Losman", 0.5), ("J. P. Losman.", 1)]
DROP_SPANS = [
    ("Losman, Moorman", 1),
    ("The answer is Moorman and Losman.", 1),
    ("Losman, and Moorman", 1),
    ("Losman", 0.5),
    ("Losman, Moorman, Evans, Price", 0.5),
]
GPQA = [
    ("It is heavy, so (A) is wrong. The answer is (B).", 1),
    ("The answer is B.", 1),
    ("**B**", 1),
    ("So we have \\boxed{B}.", 1),
    ("Answer: B", 1),
    ("The answer is (A).", 0),
    ("It is not known.", 0),
]


class Says:
    """An engine that answers question number N with the N-th text."""

    def __init__(self, chat: ChatTokenizer, texts: list[str]):
        self._chat, self._texts = chat, texts

    def generate(self, requests, sampling):
        numbers = [re.findall(r"case (\d+)", self._chat.decode_answer(request.token_ids))[-1] for request in requests]
        answers = [self._chat.encode_answer(self._texts[int(number)]) for number in numbers]
        return [Completion(ids, np.zeros(len(ids), np.float32), "stop") for ids in answers]


def scores(folder: Path, name: str, rows: list[dict], said: list[str]) -> list[float]:
    model = make_model(folder / "model")
    data = write_lines(folder / "rows.jsonl", rows)
    settings = {"folder": str(folder / "out"), "model": {"path": str(model)}, "run_code_of": ["mbpp"]}
    settings["benchmarks"] = {name: {"data": str(data), "shots": 3 if name == "mbpp" else 0}}
    (folder / "eval.yaml").write_text(json.dumps(settings))
    loaded, chat = load_settings(folder / "eval.yaml", []), ChatTokenizer(model)
    lm = EngineLM(Says(chat, said), chat, prompt_suffix="", batch_size=8, max_tokens=4096, seed=0)
    lm.begin(name, 0, AnswerFile(folder / "answers.jsonl"))
    return [row["score"] for row in Harness(loaded).ask(name, getattr(loaded.benchmarks, name), lm)]


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_ALLOW_CODE_EVAL"):
        monkeypatch.setitem(os.environ, name, "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.chdir(Path(__file__).parent)  # where the package evaluate looks for code_eval first


def test_mbpp(tmp_path):
    tests = [f"assert double({n}) == {2 * n}" for n in (1, 2, 3)]
    rows = [{"task_id": i, "text": f"Double it, case {i}.", "code": "", "test_list": tests} for i in range(len(MBPP))]
    needs_setup = {"test_setup_code": "four = 4", "test_list": [*tests[:2], "assert double(four) == 8"]}
    rows.append(rows[0] | {"text": f"Double it, case {len(MBPP)}."} | needs_setup)
    said = [*MBPP, (PROGRAM, 1)]
    assert scores(tmp_path, "mbpp", rows, [text for text, _ in said]) == [score for _, score in said]


def test_drop(tmp_path):
    rows, said = [], [*DROP, *DROP_SPAN, *DROP_SPANS]
    right = [("3.5", [])] * len(DROP) + [("", ["J. P. Losman"])] * len(DROP_SPAN)
    right += [("", ["Losman", "Moorman"])] * len(DROP_SPANS)
    for i, (number, spans) in enumerate(right):
        rows.append({"query_id": f"q{i}", "passage": "He ran 3.5 miles.", "question": f"How far or who, case {i}?"})
        rows[-1] |= {"answer": {"number": number, "date": DATE, "spans": spans}}
        rows[-1] |= {"validated_answers": {"number": [], "date": [], "spans": []}}
    assert scores(tmp_path, "drop", rows, [text for text, _ in said]) == [score for _, score in said]


def test_gpqa(tmp_path):
    """B is right where the shuffle has put it there: the letter that is said is moved along."""
    rows = [
        {"Question": f"How high, case {i}?", "Correct Answer": "right", "Incorrect Answer 1": "one"}
        | {"Incorrect Answer 2": "two", "Incorrect Answer 3": "three"}
        for i in range(len(GPQA))
    ]
    right = []
    for letter in "ABCD":
        said = [
            text.replace("(A)", "(X)").replace("B", letter).replace("(X)", f"({'B' if letter == 'A' else 'A'})")
            for text, _ in GPQA
        ]
        (tmp_path / letter).mkdir()
        right.append(scores(tmp_path / letter, "gpqa_diamond", rows, said))
    # of the four letters one is right in every row, whatever the form, and none in the last
    assert [max(column) for column in zip(*right, strict=True)] == [1, 1, 1, 1, 1, 1, 0]
    assert [sum(column) for column in zip(*right, strict=True)][:5] == [1] * 5
