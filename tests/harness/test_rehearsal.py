"""What is wrong with the data of any benchmark is said before the first question of the first one."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

if find_spec("lm_eval") is None:
    pytest.skip(
        "lm_eval is not installed; launch/test.sh runs this in an environment of its own", allow_module_level=True
    )

import datasets
from test_against_lm_eval import make_model, write_lines

from npd_ascend.__main__ import main
from npd_ascend.durable import sha256
from npd_ascend.evaluate import settings as settings_module

ROOT = Path(__file__).parents[2]
GSM8K = {"question": "What is 1 and 2?", "answer": "We add.\n#### 3"}
DROP = {"query_id": "q", "passage": "Team 1 won.", "question": "Who won?"}
DROP |= {"answer": {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": ["Team 1"]}}
DROP |= {"validated_answers": {"number": [], "date": [], "spans": []}}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setitem(os.environ, name, "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def copy_of_the_hubs(folder: Path, configuration: str, split: str, rows: list[dict]) -> Path:
    folder.mkdir()
    files = [{"split": name, "path": f"{name}.jsonl"} for name in ("train", split)]
    for file in files:
        write_lines(folder / file["path"], rows)
    head = {"configs": [{"config_name": configuration, "data_files": files}]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(head)}---\n")
    return folder


def refused(folder: Path, data: dict[str, Path], capsys) -> str:
    """The last line of what is said, and the first benchmark was not asked."""
    settings = {"folder": str(folder / "out"), "model": {"path": str(make_model(folder / "model"))}}
    settings["benchmarks"] = {name: {"data": str(place), "shots": 0} for name, place in data.items()}
    (folder / "eval.yaml").write_text(json.dumps(settings))
    assert main(["eval", "--benchmarks", str(folder / "eval.yaml")]) == 2
    assert not list((folder / "out").rglob("answers-*"))
    return capsys.readouterr().err.splitlines()[-1]


def test_a_prompt_that_is_too_long(tmp_path, capsys):
    long = DROP | {"passage": "Team 1 won. " * 500}
    data = {"gsm8k": write_lines(tmp_path / "gsm8k.jsonl", [GSM8K])}
    data["drop"] = write_lines(tmp_path / "drop.jsonl", [DROP, long])
    said = refused(tmp_path, data, capsys)
    assert said.startswith("npd eval: benchmarks.drop: a prompt of 60")
    assert "do not fit into 4096" in said


@pytest.mark.parametrize(
    ("name", "row", "why"),
    [
        ("gsm8k", {"question": "What is 1 and 2?", "solution": "3"}, "'answer' is undefined"),
        ("gsm8k", {"question": "What is 1 and 2?", "answer": None}, "rows of gsm8k without answer"),
        ("drop", DROP | {"answer": {"spans": ["Team 1"]}}, "KeyError: 'number'"),
        ("math500", {"problem": "What is 1 and 2?", "solution": "It is 3."}, "does not fit lm-eval's task of MATH-500"),
    ],
    ids=["missing", "empty", "inside", "without a box"],
)
def test_a_row_that_does_not_fit(name, row, why, tmp_path, capsys):
    shapes = {"gsm8k": ("main", "test"), "drop": ("default", "validation"), "math500": ("default", "test")}
    configuration, split = shapes[name]
    place = copy_of_the_hubs(tmp_path / "copy", configuration, split, [row])
    said = refused(tmp_path, {name: place}, capsys)
    assert said.startswith(f"npd eval: benchmarks.{name}.data: ")
    assert str(place) in said
    assert why in said
    assert "cannot be loaded" not in said  # the copy itself is sound


def test_a_copy_without_the_split_that_is_asked(tmp_path, capsys):
    said = refused(tmp_path, {"gsm8k": copy_of_the_hubs(tmp_path / "copy", "main", "validation", [GSM8K])}, capsys)
    assert "split" in said
    assert "KeyError: 'test'" in said
    assert "cannot be loaded" not in said


def test_a_folder_is_read_once_for_its_digest_and_once_for_its_rows_whatever_is_asked(tmp_path, monkeypatch):
    place, read, loaded = copy_of_the_hubs(tmp_path / "copy", "main", "test", [GSM8K]), [], []
    monkeypatch.setattr(settings_module, "sha256", lambda file: read.append(file.name) or sha256(file))
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: loaded.append(1) or load(*args, **kwargs))
    sampled = {"data": str(place), "shots": 0, "max_new_tokens": 4, "samples": 2, "temperature": 1.0}
    settings = {"folder": str(tmp_path / "out"), "model": {"path": str(make_model(tmp_path / "model"))}}
    (tmp_path / "eval.yaml").write_text(json.dumps(settings | {"benchmarks": {"gsm8k": sampled}}))
    assert main(["eval", "--benchmarks", str(tmp_path / "eval.yaml")]) == 0
    assert sorted(read) == ["README.md", "test.jsonl", "train.jsonl"]
    assert loaded == [1]


def test_a_dry_run_looks_at_everything_and_asks_nothing(tmp_path, capsys, monkeypatch):
    """As launch/repro_openpangu_1b.sh begins, of the start in the place of what will come out."""
    monkeypatch.chdir(ROOT)
    words = [
        "eval",
        "--benchmarks",
        "configs/repro/openpangu_tiny/eval.yaml",
        "--dry-run",
        f"folder={tmp_path / 'out'}",
    ]
    assert main(words) == 0
    assert capsys.readouterr().out.endswith("are sound: 1 benchmarks, 16 requests; none was asked\n")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["eval.lock"]
    assert main(["eval", "--config", "configs/addition_cpu.yaml", "--dry-run"]) == 2
    assert "--dry-run goes with --benchmarks" in capsys.readouterr().err
