"""What a model may write for a right answer, where the filter is ours: through lm-eval, without a model."""

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml

if find_spec("lm_eval") is None:
    pytest.skip(
        "lm_eval is not installed; launch/test.sh runs this in an environment of its own", allow_module_level=True
    )

import datasets
from lm_eval.api.instance import Instance
from lm_eval.filters import build_filter_ensemble
from lm_eval_command import ORIGINALS
from test_against_lm_eval import make_model, write_lines

from npd_ascend.evaluate.answers import AnswerFile
from npd_ascend.evaluate.engine_lm import EngineLM
from npd_ascend.evaluate.harness import Harness
from npd_ascend.evaluate.settings import load_settings
from npd_ascend.rollout.engine import Completion
from npd_ascend.tokenizer import ChatTokenizer

PROGRAM = "def double(n):\n    return 2 * n"
ROOT = Path(__file__).parents[2]
DATE = {"day": "", "month": "", "year": ""}
# what is said, and its score
MBPP = [
    (PROGRAM + "\n```", 1),
    (PROGRAM, 1),
    (f"```python\n{PROGRAM}\n```\nIt doubles.", 1),
    *((f"{opener}{PROGRAM}\n```", 1) for opener in ("```python \n", "```python\r\n", "``` python\n", "```\n")),
    (f"Here is it:\n\n```python\n{PROGRAM}\n```\nIt doubles.", 1),
    (f"Here is it:\n``` Python3 \r\n{PROGRAM}", 1),
    (f"{PROGRAM}\n``` This doubles.\n```python\ndouble(3)\n```", 1),
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
# all say B; whether lm-eval's own filter finds it
GPQA = [
    ("It is heavy, so (A) is wrong. The answer is (B).", True),
    ("The answer is B.", False),
    ("**B**", False),
    ("So we have \\boxed{B}.", False),
    ("Answer: B", True),
    ("**Answer**: B", True),
    ("**Answer:** B", False),
    ("$\\boxed{\\text{B}}$", False),
    ("$\\boxed{\\mathrm{B}}$", False),
    ("$\\boxed{\\textbf{(B)}}$", True),
    ("The answer is $\\mathrm{B}$.", False),
    ("B.", False),
    ("B", False),
    ("It is heavy.\n\nB", False),
    ("The correct option is B.", False),
    ("The answer is option B.", False),
    ("**B) because**", False),
    ("**Option B**", False),
    ("We rule out (A). So $\\boxed{\\text{B}}$", False),
    ("**B**\n\nIt is heavy, so (A) is wrong.", False),
    ("The answer is (B).\n\n**A**: it is heavy.", True),
    ("We try each option.\n\n(A) is heavy, so answer choice (A) is wrong. Thus (B)", True),
    ("The answer is B because it is light.", False),
    ("The answer is (B). In other words, the answer is D-type.", True),
    ("The answer is (B). My answer: A value near 20.", True),
    ("The answer is option B", False),
    ("Option B is correct.", False),
    ("We rule out (A). So option B is the correct answer", False),
    ("Option A is incorrect. Option B is correct, since it is light.", False),
    ("The answer is (B). Option A is correct.", True),
    ("It seems that option A is correct. But it is heavy, so (B)", True),
    ("It is true that option B is correct. It is not true that option A is correct.", False),
    ("The correct option is B. I do not think that the answer is A.", False),
    ("Statement II, that it is heavy, is false the answer is B", False),
]


class Says:
    """An engine that answers question number N with the N-th text."""

    def __init__(self, chat: ChatTokenizer, texts: list[str]):
        self._chat, self._texts = chat, texts

    def generate(self, requests, sampling):
        numbers = [re.findall(r"case (\d+)", self._chat.decode_answer(request.token_ids))[-1] for request in requests]
        answers = [self._chat.encode_answer(self._texts[int(number)]) for number in numbers]
        return enumerate(Completion(ids, np.zeros(len(ids), np.float32), "stop") for ids in answers)


def ask(folder: Path, name: str, rows: list[dict], said: list[str]) -> list[dict]:
    model = make_model(folder / "model")
    data = write_lines(folder / "rows.jsonl", rows)
    settings = {"folder": str(folder / "out"), "model": {"path": str(model)}, "run_code_of": ["mbpp"]}
    settings["benchmarks"] = {name: {"data": str(data), "shots": 3 if name == "mbpp" else 0}}
    (folder / "eval.yaml").write_text(json.dumps(settings))
    loaded, chat = load_settings(folder / "eval.yaml", []), ChatTokenizer(model)
    lm = EngineLM(Says(chat, said), chat, prompt_suffix="", batch_size=8, max_tokens=4096, seed=0)
    lm.begin(name, 0, AnswerFile(folder / "answers.jsonl"))
    return Harness(loaded, {}).ask(name, getattr(loaded.benchmarks, name), lm)


def scores(folder: Path, name: str, rows: list[dict], said: list[str]) -> list[float]:
    return [row["score"] for row in ask(folder, name, rows, said)]


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
    others = {"The answer is (A).": "A"}
    others |= dict.fromkeys(
        ("It is not known.", "A value near 20", "Option A is correct only if it is light."), "[invalid]"
    )
    others["Option A is not correct."] = "[invalid]"
    others["It is not true that option A is correct."] = "[invalid]"
    others["It isn't true that the correct answer is A."] = "[invalid]"
    others["It is false that the answer is A."] = "[invalid]"
    wanted = {text: "B" for text, _ in GPQA} | others
    rows = [
        {"Question": f"How high, case {i}?", "Correct Answer": "right", "Incorrect Answer 1": "one"}
        | {"Incorrect Answer 2": "two", "Incorrect Answer 3": "three"}
        for i in range(len(wanted) + 1)
    ]
    *found, by_its_text = ask(tmp_path, "gpqa_diamond", rows, [*wanted, "It is right."])
    assert dict(zip(wanted, (row["answer"] for row in found), strict=True)) == wanted
    assert [row["score"] for row in found] == [row["target"] == f"({row['answer']})" for row in found]
    assert 0 < sum(row["score"] for row in found) < len(found)  # where the shuffle has put the right one
    assert by_its_text["score"] == 1


def test_what_lm_evals_own_filter_finds_for_gpqa():
    """docs/eval.md has the count."""
    definition = (ORIGINALS / "gpqa" / "cot_zeroshot" / "_gpqa_cot_zeroshot_yaml").read_text().replace("!function ", "")
    _, flexible = yaml.safe_load(definition)["filter_list"]
    steps = [(step.pop("function"), step) for step in flexible["filter"]]
    one = {
        "doc": {"choices": ["one", "right", "two", "three"]},
        "request_type": "generate_until",
        "arguments": (),
        "idx": 0,
    }
    said = [Instance(**one, resps=[text]) for text, _ in GPQA]
    build_filter_ensemble("own", steps).apply(said)
    assert [(text, each.filtered_resps["own"] == "(B)") for (text, _), each in zip(GPQA, said, strict=True)] == GPQA
    assert f"{sum(found for _, found in GPQA)} of {len(GPQA)} forms" in (ROOT / "docs" / "eval.md").read_text()
