"""npd prepare on files of every kind it reads."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import CONFIGS

from npd_ascend.config_file import load_yaml
from npd_ascend.errors import UserError
from npd_ascend.prepare.command import PrepareConfig, is_heldout
from npd_ascend.prepare.overlap import EvaluationTexts, contaminated, words_of
from npd_ascend.prepare.sources import SourceConfig, files_of

QUESTION = "A farmer has seven red hens, four white hens and two old cows; how many legs do they have together?"
CHINESE = "小明有七个苹果，小红有三个梨，他们一共有多少个水果呢？请写出过程。"


def rows_of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def prepare(folder: Path, sources: list, **more) -> subprocess.CompletedProcess:
    config = {
        "folder": str(folder / "data"),
        "tokenizer": str(CONFIGS / "openpangu_tiny"),
        "sources": sources,
        "max_prompt_tokens": 400,
        "max_tokens": 600,
    }
    (folder / "prepare.yaml").write_text(yaml.safe_dump(config | more))
    words = [sys.executable, "-m", "npd_ascend", "prepare", str(folder / "prepare.yaml")]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def jsonl(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_of_every_kind_become_one(tmp_path):
    chat = [{"role": "user", "content": "What is 4 + 4?"}, {"role": "assistant", "content": "8"}]
    table = pa.table({"text": ["What is 2 + 2?", "What is 3 + 3?"], "label": ["4", "6"]})
    (tmp_path / "hub").mkdir()
    pq.write_table(table.slice(0, 1), tmp_path / "hub" / "part-0.parquet")
    with pa.OSFile(str(tmp_path / "hub" / "part-1.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table.slice(1, 1))
    lines = jsonl(tmp_path / "a.jsonl", {"prompt": "What is 1 + 1?", "answer": "2"}, {"prompt": chat})
    sources = [
        {"path": str(lines), "answer_key": None},
        {"path": str(tmp_path / "hub"), "prompt_key": "text", "answer_key": "label"},
    ]
    done = prepare(tmp_path, sources)
    assert done.returncode == 0, done.stderr
    written = rows_of(tmp_path / "data", "train.jsonl")
    assert [(row["prompt"], row["answer"]) for row in written] == [
        ("What is 1 + 1?", None),
        ("What is 4 + 4?", "8"),
        ("What is 2 + 2?", "4"),
        ("What is 3 + 3?", "6"),
    ]
    assert written[3]["source"] == f"{tmp_path}/hub/part-1.arrow:1"
    page = (tmp_path / "data" / "report.html").read_text()
    assert "4 rows read" in page


def saved_to_disk(folder: Path, **files: str) -> Path:
    """As Dataset.save_to_disk leaves it: the arrow files of its state.json, here those that begin with "data"."""
    folder.mkdir(parents=True)
    for name, prompt in files.items():
        table = pa.table({"prompt": [prompt]})
        with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
            out.write_table(table)
    named = [{"filename": f"{name}.arrow"} for name in files if name.startswith("data")]
    (folder / "state.json").write_text(json.dumps({"_data_files": named, "_split": None}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_of_a_data_set_saved_to_disk_its_caches_are_not_read(tmp_path):
    saved = saved_to_disk(tmp_path / "set", data_0="What is 1 + 1?", cache_0="What is 1 + 1? Now!", data_1="And 2?")
    assert [file.name for file in files_of(SourceConfig(path=saved))] == ["data_0.arrow", "data_1.arrow"]
    more = jsonl(tmp_path / "more.jsonl", {"prompt": "What is 3 + 3?"})
    assert files_of(SourceConfig(path=tmp_path)) == [more, *files_of(SourceConfig(path=saved))]


def test_of_a_data_set_with_splits_one_has_to_be_named(tmp_path):
    saved = tmp_path / "set"
    train = saved_to_disk(saved / "train", data="What is 1 + 1?")
    (saved / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert files_of(SourceConfig(path=saved)) == files_of(SourceConfig(path=train)) == [train / "data.arrow"]
    saved_to_disk(saved / "test", data="What is 2 + 2?")
    (saved / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    done = prepare(tmp_path, [{"path": str(saved)}])
    assert done.returncode == 2
    assert f"{saved}: holds the splits train, test; name one of them, as {train}" in done.stderr
    assert not (tmp_path / "data").exists()
    both = files_of(SourceConfig(path=saved), all_splits=True)  # as for what must not be trained on
    assert both == [saved / "test" / "data.arrow", train / "data.arrow"]


def test_a_copy_of_a_saved_data_set_that_is_not_whole(tmp_path):
    saved = saved_to_disk(tmp_path / "set", data_0="What is 1 + 1?", data_1="What is 2 + 2?")
    (saved / "data_1.arrow").unlink()
    with pytest.raises(UserError, match=r"state.json: names data_1.arrow, which is not there; copy the folder again"):
        files_of(SourceConfig(path=saved))
    (saved / "state.json").write_text('{"_data_files": [')
    with pytest.raises(UserError, match=r"state.json: not JSON \(.*\); copy the folder again"):
        files_of(SourceConfig(path=saved))
    (saved / "state.json").write_text("[1]")  # another program's
    assert files_of(SourceConfig(path=saved)) == [saved / "data_0.arrow"]


def test_every_row_is_accounted_for(tmp_path):
    train = jsonl(
        tmp_path / "train.jsonl",
        {"prompt": "What is a hen?", "answer": "A bird."},
        {"prompt": "  what IS\u00a0a  hen? ", "answer": "Again."},
        {"prompt": "word " * 500},
        {"prompt": "How long?", "answer": "word " * 700},
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
        {"prompt": " "},
        {"prompt": "Please: " + QUESTION.upper().replace("SEVEN RED", "Seven, red")},
        {"prompt": "What does the text say?", "answer": CHINESE},
        {"prompt": "Ni hao"},
        {"prompt": "Count the legs of seven hens."},
    )
    test = jsonl(tmp_path / "test.jsonl", {"q": QUESTION}, {"q": CHINESE}, {"q": "Ni hao!"})
    sources = [{"path": str(train), "answer_key": "answer"}]
    done = prepare(tmp_path, sources, evaluation_sets=[{"path": str(test), "prompt_key": "q"}])
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "data" / "statistics.json").read_text())["rows"]
    wanted = {"read": 10, "train": 2, "heldout": 0, "no_text": 2, "too_long": 2, "duplicate": 1, "contaminated": 3}
    assert counts == wanted
    assert [row["prompt"] for row in rows_of(tmp_path / "data", "train.jsonl")] == [
        "What is a hen?",
        "Count the legs of seven hens.",
    ]
    leaked = [row for row in rows_of(tmp_path / "data", "dropped.jsonl") if row["reason"] == "contaminated"]
    assert [row["evaluation"] for row in leaked] == [f"{test}:{number}" for number in (1, 2, 3)]
    assert leaked[0]["words"] == "a farmer has seven red hens four white hens and two old cows"
    assert "seven red hens" in (tmp_path / "data" / "report.html").read_text()


def test_a_row_is_on_the_same_side_whatever_stands_around_it(tmp_path):
    prompts = [{"prompt": f"What is {n} + {n}?"} for n in range(400)]
    for name, rows in (("one", prompts), ("two", prompts[::-3])):
        (tmp_path / name).mkdir()
        done = prepare(tmp_path / name, [{"path": str(jsonl(tmp_path / f"{name}.jsonl", *rows))}], heldout_share=0.25)
        assert done.returncode == 0, done.stderr
    held = {name: {r["prompt"] for r in rows_of(tmp_path / name / "data", "heldout.jsonl")} for name in ("one", "two")}
    assert 60 < len(held["one"]) < 140
    assert held["two"] == held["one"] & {row["prompt"] for row in prompts[::-3]}
    assert is_heldout("What is 1?", 0.5, "a") == is_heldout(" WHAT is  1?", 0.5, "a")


def test_words_are_compared_without_what_a_copy_may_change():
    assert words_of("Ｆｏｏ-bar,\n_baz_ 3.5") == ("foo", "bar", "baz", "3", "5")
    assert words_of("他有3个apple") == ("他", "有", "3", "个", "apple")


def test_found_runs_are_the_ones_a_plain_search_finds():
    import random

    rng = random.Random(0)
    texts = [(f"t{i}", " ".join(rng.choices("abcd", k=rng.randrange(1, 12)))) for i in range(60)]
    evaluation = EvaluationTexts(texts, 4)
    for _ in range(300):
        row = " ".join(rng.choices("abcd", k=rng.randrange(1, 9)))
        found = {match.words for match in evaluation.find(row, "")}
        runs = {row[at : at + 7] for at in range(0, len(row) - 6, 2)}
        wanted = {run for run in runs for _, text in texts if run in text}
        short = {row} if len(row) < 7 and row in {text for _, text in texts} else set()
        assert found == (wanted | short)


def test_boilerplate_is_no_contamination():
    evaluation = EvaluationTexts([("t", "answer the question with one letter and a reason please")], 5)
    match = evaluation.find("answer the question with one word", "")
    assert contaminated(dict.fromkeys(range(3), match), common=3).keys() == {0, 1, 2}
    assert contaminated(dict.fromkeys(range(4), match), common=3) == {}


def test_an_evaluation_set_without_texts_is_refused_and_partly_without_is_counted(tmp_path):
    train = jsonl(tmp_path / "train.jsonl", {"prompt": "What is 1 + 1?", "answer": 2})
    turns = jsonl(tmp_path / "turns.jsonl", {"prompt": ["one", "two"]}, {"prompt": ["three"]})
    done = prepare(tmp_path, [{"path": str(train), "answer_key": "answer"}], evaluation_sets=[{"path": str(turns)}])
    assert done.returncode == 2
    assert "turns.jsonl: none of its 2 rows has a text" in done.stderr
    jsonl(tmp_path / "turns.jsonl", {"prompt": ["one", "two"]}, {"prompt": "three"})
    done = prepare(tmp_path, [{"path": str(train), "answer_key": "answer"}], evaluation_sets=[{"path": str(turns)}])
    assert "turns.jsonl: 2 rows, 1 of them without a text" in done.stdout
    assert rows_of(tmp_path / "data", "train.jsonl")[0]["answer"] == "2"


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        ('{"prompt": "x"}\n{"prompt": \n', "a.jsonl", "a.jsonl:2: not JSON"),
        ('{"question": "x"}\n', "a.jsonl", "a.jsonl:1: no key 'prompt'; set prompt_key"),
        ("PAR1", "a.parquet", "a.parquet: not a Parquet file"),
        ("text", "a.arrow", "a.arrow: not an Arrow stream"),
        ("text", "a.txt", "want files that end in .jsonl, .parquet, .arrow"),
    ],
)
def test_a_wrong_file_is_named_and_nothing_is_left(tmp_path, content, name, said):
    (tmp_path / name).write_text(content)
    done = prepare(tmp_path, [{"path": str(tmp_path / name)}])
    assert done.returncode == 2
    assert said in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"prepare.yaml", name}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "nothing is left (they have no row)"),
        ('{"prompt": "a b c"}\n' * 2, "nothing is left (2 of 2 rows: too_long, "),
    ],
)
def test_sources_that_leave_nothing_leave_no_folder(content, said, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    done = prepare(tmp_path, [{"path": str(tmp_path / "a.jsonl")}], max_prompt_tokens=1)
    assert done.returncode == 2
    assert f"sources: {tmp_path / 'a.jsonl'}: {said}" in done.stderr
    assert not (tmp_path / "data").exists()


def test_a_typo_in_a_list_is_told_with_the_keys_that_are_there(tmp_path):
    done = prepare(tmp_path, [{"path": "a.jsonl", "promt_key": "question"}])
    assert done.returncode == 2
    assert re.search(r"unknown key sources.0.promt_key; known keys there: .*prompt_key", done.stderr)


def test_the_file_that_comes_with_the_project_is_sound():
    config = load_yaml(PrepareConfig, CONFIGS / "prepare/gsm8k.yaml", ())
    assert config.evaluation_sets[0].prompt_key == "question"


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "data").mkdir()
    done = prepare(tmp_path, [{"path": str(jsonl(tmp_path / "a.jsonl", {"prompt": "x"}))}])
    assert done.returncode == 2
    assert "data: there already" in done.stderr
    assert prepare(tmp_path, []).stderr.count("sources: ") == 1
