"""MBPP and HumanEval by `npd eval --benchmarks` against lm-eval's own command, with code that runs.

What the hub's metric code_eval does is in code_eval/ here. The model has random weights and writes lines of digits,
which are programs, and the marks that end a block of code. HumanEval's questions make a string of them; MBPP's tests
read their own program. Half of both want what the model said, MBPP's from a file, since its tests stand in the
question.
"""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("lm_eval") is None:
    pytest.skip(
        "lm_eval is not installed; launch/test.sh runs this in an environment of its own", allow_module_level=True
    )

import datasets
from hub import npd_eval_from_hub
from lm_eval_command import lm_eval_command, scores_of
from test_against_lm_eval import (
    NEW_TOKENS,
    SHOTS,
    make_model,
    npd_eval,
    npd_eval_command,
    npd_settings,
    said_by,
    write_lines,
)

from npd_ascend.evaluate import engine_lm

QUESTIONS, WANTED = 16, "NPD_TEST_WANTED"
DIGITS = "123456789"
HUMANEVAL_PROMPT = 'def said_{i}():\n    """What is {i} times {i}?"""\n    return """'


def make_data(folder: Path, said: dict[str, list[str]]) -> dict[str, Path]:
    """said: programs that came of the model's answers, in HumanEval behind the prompt; empty if they are not known."""
    folder.mkdir()
    mbpp, humaneval = [], []
    for i in range(QUESTIONS):
        known = said and i % 2
        (Path(os.environ[WANTED]) / str(i)).write_text(said["mbpp"][i] if known else "nothing")
        tests = ["import os, sys", f"wanted = open(os.environ['{WANTED}'] + '/{i}').read()"]
        tests.append(f"assert sys.orig_argv[-1].startswith(wanted + chr(10))  # {chr(97 + i) * 24}")
        mbpp.append({"task_id": 11 + i, "text": f"Write a program about {i * i}.", "code": "", "test_list": tests})
        prompt = HUMANEVAL_PROMPT.format(i=i)
        wanted = said["humaneval"][i].removeprefix(prompt) if known else str(i)
        test = f'""".strip()\ndef check(candidate):\n    assert candidate() == {wanted.strip()!r}\n'
        humaneval.append({"task_id": f"X/{i}", "prompt": prompt, "test": test, "entry_point": f"said_{i}"})
    rows = {"mbpp": mbpp, "humaneval": humaneval}
    return {name: write_lines(folder / f"{name}.jsonl", lines) for name, lines in rows.items()}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(folder, model, data, scores of lm-eval's own command)."""
    folder, here = tmp_path_factory.mktemp("code"), Path.cwd()
    (folder / "wanted").mkdir()
    changed = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_ALLOW_CODE_EVAL": "1"}
    changed[WANTED] = str(folder / "wanted")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changed.items():
            patch.setitem(os.environ, name, value)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "hf")
        patch.setitem(SHOTS, "mbpp", 3)  # they stand in the task
        os.chdir(Path(__file__).parent)  # where the package evaluate looks for code_eval first
        try:
            model = make_model(folder / "model", ("```", *DIGITS, *("\n" + digit for digit in DIGITS)), seed=6)
            npd_eval(folder / "said", model, make_data(folder / "first", {}))
            said = {name: said_by(folder / "said", name) for name in ("mbpp", "humaneval")}
            said["humaneval"] = [program for (program,) in said["humaneval"]]  # lm-eval's filter gives a list
            assert len(set(said["mbpp"])) > 2
            assert all(said["mbpp"])
            data = make_data(folder / "data", said)
            more = "--confirm_run_unsafe_code"
            scores = lm_eval_command(folder / "theirs", model, data, SHOTS, more, new_tokens=NEW_TOKENS)
            assert all(0.1 < sum(each) / len(each) < 0.9 for each in scores.values()), scores
            yield folder, model, data, scores
        finally:
            os.chdir(here)


def test_the_same_scores_as_lm_evals_own_command(theirs):
    folder, model, data, scores = theirs
    assert npd_eval(folder / "ours", model, data) == scores  # question by question
    assert [len(each) for each in scores.values()] == [QUESTIONS, QUESTIONS]


@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed; launch/test.sh has it here")
def test_vllm_gives_the_scores_of_transformers(theirs):
    folder, model, data, scores = theirs
    settings = npd_settings(folder / "vllm", model, data)
    settings["model"]["engine"] = "vllm"
    npd_eval_command(settings)
    assert scores_of(folder / "vllm") == scores
    assert said_by(folder / "vllm", "mbpp") == said_by(folder / "ours", "mbpp")


def test_answers_read_by_an_older_filter_are_not_mixed_in(theirs, capsys):
    folder, model, data, _ = theirs
    npd_eval(folder / "older", model, {"mbpp": data["mbpp"]})
    saved = folder / "older" / "mbpp" / "settings.json"
    identity = json.loads(saved.read_text())
    saved.write_text(json.dumps({key: value for key, value in identity.items() if key != "task"}))
    with pytest.raises(AssertionError):
        npd_eval(folder / "older", model, {"mbpp": data["mbpp"]})
    assert "the answers there were given with another task" in capsys.readouterr().err


def test_another_prompt_shows(theirs, monkeypatch):
    folder, model, data, scores = theirs
    plain = lambda self, turns, add_generation_prompt=True: "".join(turn["content"] for turn in turns)  # noqa: E731
    monkeypatch.setattr(engine_lm.EngineLM, "apply_chat_template", plain)
    wrong = npd_eval(folder / "no_template", model, data)
    assert all(wrong[name] != scores[name] for name in scores), (wrong, scores)


def test_another_answer_shows(theirs, monkeypatch):
    folder, model, data, scores = theirs
    monkeypatch.setattr(engine_lm, "postprocess_generated_text", lambda text, stop, think: "+8```")
    wrong = npd_eval(folder / "other_answer", model, data)
    assert all(wrong[name] != scores[name] for name in scores), (wrong, scores)


def test_code_runs_only_where_it_was_allowed(theirs, tmp_path, capsys):
    _, model, data, _ = theirs
    with pytest.raises(AssertionError):
        npd_eval(tmp_path / "refused", model, {"mbpp": data["mbpp"]}, run_code_of=[])
    assert "run_code_of" in capsys.readouterr().err
    assert not list((tmp_path / "refused").rglob("questions-0.json"))


def test_from_the_hub_it_is_the_same(theirs):
    """The rows. The metric is the one in code_eval/, and the hub is not asked for it."""
    folder, model, data, scores = theirs
    (folder / "online").mkdir()
    settings = npd_settings(folder / "online" / "scores", model, data)
    npd_eval_from_hub(folder / "online", settings, data, cwd=Path(__file__).parent)
    assert scores_of(folder / "online" / "scores") == scores
