"""The published scores' settings: fast thinking by a suffix, an empty system turn, and a thought is no answer."""

import json
import os
from importlib.util import find_spec

import numpy as np
import pytest

if find_spec("lm_eval") is None:
    pytest.skip(
        "lm_eval is not installed; launch/test.sh runs this in an environment of its own", allow_module_level=True
    )

import datasets
from test_against_lm_eval import write_lines
from test_pangu import make_tokenizer

from npd_ascend.evaluate.answers import AnswerFile
from npd_ascend.evaluate.engine_lm import EngineLM
from npd_ascend.evaluate.harness import Harness
from npd_ascend.evaluate.settings import load_settings
from npd_ascend.rollout.engine import Completion
from npd_ascend.tokenizer import ChatTokenizer


class Thinks:
    """Has the right number in its thought alone."""

    def __init__(self, chat: ChatTokenizer):
        self._chat, self.asked = chat, []

    def generate(self, requests, sampling):
        self.asked += [request.token_ids for request in requests]
        said = self._chat.encode_answer("[unused16]It may be 3.[unused17]I do not know.")
        return enumerate(Completion(said, np.zeros(len(said), np.float32), "stop") for _ in requests)


def test_suffix_system_turn_and_thought(tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setitem(os.environ, name, "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    model = make_tokenizer(tmp_path / "model")
    (model / "config.json").write_text("{}")  # only looked for
    data = write_lines(tmp_path / "gsm8k.jsonl", [{"question": "two plus one?", "answer": "#### 3"}])
    settings = {"folder": str(tmp_path / "out"), "model": {"path": str(model), "prompt_suffix": " /no_think"}}
    settings["benchmarks"] = {"gsm8k": {"data": str(data), "shots": 0}}
    (tmp_path / "eval.yaml").write_text(json.dumps(settings))
    loaded, chat = load_settings(tmp_path / "eval.yaml", []), ChatTokenizer(model)
    engine, suffix = Thinks(chat), loaded.model.prompt_suffix
    lm = EngineLM(engine, chat, prompt_suffix=suffix, batch_size=1, max_tokens=4096, seed=0)
    lm.begin("gsm8k", 0, AnswerFile(tmp_path / "answers.jsonl"))
    (row,) = Harness(loaded, {}).ask("gsm8k", loaded.benchmarks.gsm8k, lm)
    assert (row["answer"], row["score"]) == ("[invalid]", 0)
    # in the published format, which tests/test_pangu.py writes out
    assert engine.asked == [chat.encode_prompt("Question: two plus one?\nAnswer: /no_think")]
