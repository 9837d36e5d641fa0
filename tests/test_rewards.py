"""Reward functions, and what becomes of one that raises, hangs or takes its process along."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from npd_ascend.config import ReasoningGymSource
from npd_ascend.errors import UserError
from npd_ascend.rewards import functions
from npd_ascend.rewards.functions import Answer, check_installed, reward_of
from npd_ascend.rewards.sandbox import Sandbox


def answer(text, reference="7", **changes):
    given = {"text": text, "whole_text": text, "reference": reference, "prompt_id": "problems:7"}
    return Answer(**given | {"format": None, "dataset": None} | changes)


def test_exact_match_and_format():
    assert [reward_of("exact_match", answer(text)) for text in (" 7\n", "8", "7 apples")] == [1.0, 0.0, 0.0]
    pattern = r"<think>.*</think>\s*\d+"
    assert reward_of("format", answer("<think>a\nb</think> 7", format=pattern)) == 1.0
    assert reward_of("format", answer("7", format=pattern)) == 0.0
    assert reward_of("format", answer("<think>a</think> 7 and more", format=pattern)) == 0.0  # the whole answer


def test_math_verify_sees_through_notation():
    pytest.importorskip("math_verify", reason="pip install -r requirements-rewards.txt")
    assert reward_of("math_verify", answer("so it is $\\frac{1}{2}$", "0.5")) == 1.0
    assert reward_of("math_verify", answer("so it is $\\frac{1}{3}$", "0.5")) == 0.0
    assert reward_of("math_verify", answer("so it is not known", "0.5")) == 0.0


def test_what_math_verify_stumbles_over_is_not_a_wrong_answer():
    pytest.importorskip("math_verify", reason="pip install -r requirements-rewards.txt")
    with pytest.raises(Exception, match="could not parse"):
        reward_of("math_verify", answer(f"so it is ${'9' * 5000}$", "0.5"))


def test_reasoning_gym_finds_the_problem_again():
    """With the parameters and the number of rows that it was made with: rows of acre depend on how many there are."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    sources = [
        ReasoningGymSource(kind="reasoning_gym", datasets=("chain_sum",), parameters=parameters, seed=3, count=9)
        for parameters in ({}, {"chain_sum": {"max_terms": 2, "max_digits": 3}})
    ]
    sources.append(ReasoningGymSource(kind="reasoning_gym", datasets=("acre",), seed=3, count=2))
    for source in sources:
        (name,) = source.datasets
        arguments = source.arguments(name)
        entry = reasoning_gym.create_dataset(**arguments)[1]
        problem = {"prompt_id": f"problems:{name}:3:1", "reference": entry["answer"], "dataset": arguments}
        assert reward_of("reasoning_gym", answer(entry["answer"], **problem)) == 1.0
        assert reward_of("reasoning_gym", answer("no number", **problem)) < 1.0


def test_a_data_set_of_many_words_is_read_once():
    pytest.importorskip("reasoning_gym")
    functions._reasoning_gym_dataset.cache_clear()
    arguments = ReasoningGymSource(kind="reasoning_gym", datasets=("spell_backward",), count=50).arguments
    for row in range(50):
        given = answer("x", prompt_id=f"problems:spell_backward:0:{row}", dataset=arguments("spell_backward"))
        reward_of("reasoning_gym", given)
    assert functions._reasoning_gym_dataset.cache_info().misses == 1


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(functions.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"grpo\.rewards: math_verify is not installed; pip install -r"):
        check_installed(["exact_match", "math_verify"])


@pytest.fixture
def sandbox():
    opened = []

    def make(rewards, timeout_s=20.0):
        opened.append(Sandbox(rewards, timeout_s))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def test_a_reward_that_raises_is_named_and_the_next_answer_is_judged(sandbox):
    judge = sandbox(["exact_match"])
    assert judge.score(answer("7")) == ({"exact_match": 1.0}, "")
    values, why = judge.score(answer("7", reference=None))
    assert values is None
    assert re.match("raised: exact_match: AttributeError", why)
    assert judge.score(answer("8")) == ({"exact_match": 0.0}, "")


def test_a_reward_that_hangs_is_stopped(sandbox):
    """A regular expression that backtracks for ever: one call into C, which no signal handler interrupts."""
    judge = sandbox(["format"], timeout_s=1.0)
    started = time.monotonic()
    hang = answer("a" * 60 + "b", format="(a+)+c")
    values, why = judge.score(hang)
    assert values is None
    assert why.startswith("timeout: no reward within 1 s")
    assert time.monotonic() - started < 30
    assert judge.score(answer("aac", format="(a+)+c")) == ({"format": 1.0}, "")


def test_what_was_stopped_is_gone(sandbox):
    judge = sandbox(["format"], timeout_s=0.5)
    judge.score(answer("aac", format="(a+)+c"))
    pid = judge._child.pid
    judge.score(answer("a" * 60 + "b", format="(a+)+c"))
    assert not Path(f"/proc/{pid}").exists()


def test_a_process_that_ends_is_a_failure_like_any_other(sandbox):
    judge = sandbox(["exact_match"])
    judge.score(answer("7"))
    judge._child.kill()
    values, why = judge.score(answer("7"))
    assert values is None
    assert why.startswith("raised: ")
    assert judge.score(answer("7")) == ({"exact_match": 1.0}, "")


def test_the_child_needs_no_torch():
    code = "import sys, npd_ascend.rewards.child; sys.exit('torch' in sys.modules)"
    assert subprocess.run([os.sys.executable, "-c", code], check=False).returncode == 0
