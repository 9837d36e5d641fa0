"""The scripts that made the figures of the documents still fit the code that they call."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from conftest import CONFIGS

from npd_ascend.tokenizer import ChatTokenizer

FOLDER = CONFIGS.parent / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_finds_all_that_it_imports(script, monkeypatch):
    """TRL, which one of them starts in an environment of its own, is in benchmarks/on_policy."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    spec = importlib.util.spec_from_file_location(f"benchmark_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert module.__doc__


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Two updates on two sets of two answers each, without a seed."""
    monkeypatch.syspath_prepend(FOLDER / "on_policy")
    prompts, models = tmp_path / "prompts.json", CONFIGS / "addition"
    ids = [ChatTokenizer(models / "student").encode_prompt(f"{n}+{n}") for n in range(100, 110)]
    prompts.write_text(json.dumps([{"token_ids": prompt} for prompt in ids]))
    settings = {"engine": "hf", "padded": True, "loss": "full", "set": 2, "epochs": 1, "filtered": False}
    job = {"folder": str(tmp_path), "teacher": str(models / "teacher"), "student": str(models / "student")}
    job |= {"prompts": str(prompts), "dtype": "float32", "settings": settings, "max_new_tokens": 6, "beta2": 0.95}
    return job | {"lr": 1e-3, "warmup_steps": 1, "passes": 4, "seconds": 600, "sets": 9, "save_every": 99}


def test_a_row_against_on_policy_training_repeats_with_its_seed(job):
    from with_npd import Row

    def weights(seed):
        (saved,) = Row(job | {"seed": seed}).run()["saved"]
        return (Path(saved["weights"]) / "model.safetensors").read_bytes()

    assert weights(0) == weights(0)


def test_its_seed_draws_prompts_and_answers(job):
    from generators import request_seed
    from with_npd import Row

    rows = [Row(job | {"seed": seed}) for seed in (0, 0, 1)]
    sets = [next(row._sets()) for row in rows]
    assert sets[0] == sets[1] != sets[2]
    seeds = [{request_seed(row.job, number) for number in range(10**4)} for row in rows]
    assert seeds[0] == seeds[1]
    assert not seeds[0] & seeds[2]
