"""`npd eval --benchmarks` without lm-eval: settings, what is kept over a kill, scores, the table.

What needs lm-eval is in tests/harness.
"""

import json
from importlib.util import find_spec

import pytest
import yaml
from conftest import CONFIGS

from npd_ascend.__main__ import main
from npd_ascend.durable import only_process
from npd_ascend.errors import UserError
from npd_ascend.evaluate.answers import AnswerFile
from npd_ascend.evaluate.benchmarks import BENCHMARKS, PUBLISHED
from npd_ascend.evaluate.command import _same_as_before
from npd_ascend.evaluate.scores import score_of, wilson
from npd_ascend.evaluate.settings import BenchmarkSet, content_digest, load_settings
from npd_ascend.evaluate.table import average, terminal_table, write_results

STUDENT = CONFIGS / "addition" / "student"


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "1+1", "answer": "#### 2"}\n')
    return file


@pytest.fixture
def settings_file(tmp_path, questions):
    """Writes settings with the given changes of its sections and gives their path."""

    def write(**changes):
        settings = {
            "folder": str(tmp_path / "out"),
            "model": {"path": str(STUDENT)},
            "benchmarks": {"gsm8k": {"shots": 0, "data": str(questions)}},
        }
        path = tmp_path / "eval.yaml"
        path.write_text(yaml.safe_dump(settings | changes))
        return path

    return write


@pytest.mark.parametrize(
    "path",
    [*CONFIGS.glob("eval/*.yaml"), *CONFIGS.glob("repro/*/eval.yaml")],
    ids=lambda p: str(p.relative_to(CONFIGS)),
)
def test_the_configurations_that_come_with_the_project_load(path):
    settings = load_settings(path, [f"model.path={STUDENT}", "run_code_of=[mbpp, humaneval]"])
    assert settings.model.path == STUDENT
    if "openpangu_1b" in path.parts:
        assert [name for name, _ in settings.benchmarks.asked()] == list(BENCHMARKS)
        assert settings.model.system_prompt == "none"
        assert settings.model.prompt_suffix == " /no_think"


def test_every_benchmark_has_a_key():
    assert list(BenchmarkSet.model_fields) == list(BENCHMARKS)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"benchmarks": {"gsm9k": {}}}, "unknown key benchmarks.gsm9k; known keys there: mmlu, cmmlu"),
        ({"benchmarks": {}}, "benchmarks names none"),
        ({"benchmarks": {"gsm8k": {"shot": 0}}}, "unknown key benchmarks.gsm8k.shot; known keys there: data, shots"),
        ({"benchmarks": {"gsm8k": {"data": "nowhere.jsonl"}}}, "benchmarks.gsm8k.data: "),
        ({"benchmarks": {"gsm8k": {"data": "eval.yaml", "shots": 5}}}, "examples come from another split"),
        ({"benchmarks": {"mmlu": {"data": "eval.yaml"}}}, "MMLU has one per subject"),
        ({"benchmarks": {"humaneval": {}}}, "run_code_of: [humaneval]"),
        ({"benchmarks": {"mbpp": {}}, "run_code_of": ["humaneval"]}, "run_code_of: [mbpp]"),
        ({"benchmarks": {"gsm8k": {"samples": 4}}}, "samples=4 at temperature 0"),
        ({"benchmarks": {"mmlu": {"temperature": 1.0}}}, "benchmarks.mmlu compares the log-probs"),
        ({"model": {"path": "nowhere"}}, "nowhere/config.json: no such file"),
        ({"model": {"path": "x", "trust_remote_code": True}}, "unknown key model.trust_remote_code"),
    ],
)
def test_wrong_settings_are_said_in_one_line(settings_file, monkeypatch, tmp_path, changes, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load_settings(settings_file(**changes), [])
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"question": "1+1", "answer": "2"}\n{"text": "1+1", "answer": "2"}\n', ":2: has no question; GSM8K wants"),
        ('{"question": "1+1",\n', ":1: not JSON"),
        ("[1]\n", ":1: has no question, answer"),
        ("\n", ": holds no question"),
    ],
)
def test_rows_that_do_not_fit_are_said_with_their_line(settings_file, questions, content, reason):
    questions.write_text(content)
    with pytest.raises(UserError) as error:
        load_settings(settings_file(), [])
    assert str(error.value).startswith(f"benchmarks.gsm8k.data: {questions}{reason}")


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed here")
def test_lm_eval_is_asked_for_by_name(settings_file, capsys):
    assert main(["eval", "--benchmarks", str(settings_file())]) == 2
    said = capsys.readouterr().err
    assert "lm_eval is not installed; pip install -r requirements-eval.txt" in said
    assert said.count("\n") == 1


def test_answers_are_asked_once_even_after_a_kill(tmp_path):
    path, asked = tmp_path / "answers.jsonl", []

    def ask(batch):
        asked.append(batch)
        return [f"answer to {question}" for question in batch]

    first = AnswerFile(path)
    for number, batch in enumerate([["a", "b"], ["c"]]):
        first.batch("generate_until", number, batch, lambda b=batch: ask(b))
    path.write_bytes(path.read_bytes() + b'{"kind": "generate_un')  # killed while it wrote
    second = AnswerFile(path)
    for number, batch in enumerate([["a", "b"], ["c"], ["d"]]):
        assert second.batch("generate_until", number, batch, lambda b=batch: ask(b)) == [
            f"answer to {q}" for q in batch
        ]
    assert asked == [["a", "b"], ["c"], ["d"]]
    assert AnswerFile(path).batch("generate_until", 2, ["d"], list) == ["answer to d"]
    with pytest.raises(UserError, match="answers to other questions"):
        AnswerFile(path).batch("generate_until", 0, ["a", "x"], list)


def test_answers_of_another_model_are_not_mixed_in(tmp_path):
    _same_as_before(tmp_path / "gsm8k", {"seed": 1, "model": {"config.json": "aa"}})
    _same_as_before(tmp_path / "gsm8k", {"seed": 0, "model": {"config.json": "aa"}})  # nothing was answered yet
    (tmp_path / "gsm8k" / "answers-0.jsonl").touch()
    _same_as_before(tmp_path / "gsm8k", {"seed": 0, "model": {"config.json": "aa"}})
    with pytest.raises(UserError, match=r"config\.json was 'aa', is 'bb'"):
        _same_as_before(tmp_path / "gsm8k", {"seed": 0, "model": {"config.json": "bb"}})


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ({"data": None}, {"data": "aa"}, "given with data whose content an older version did not record; set folder"),
        ({"data": "aa"}, {"data": "bb"}, "given with another data (was 'aa', is 'bb'); set folder"),
        (
            {"benchmark": {"data": None}, "data": None},
            {"benchmark": {"data": "/copy"}, "data": "aa"},
            "another benchmark (data was None, is '/copy')",
        ),
        ({"seed": 0}, {}, "given with another seed (was 0, is None)"),
        (
            {"task": {"filter_list": ["a"], "doc_to_target": "c"}},
            {"task": {"filter_list": ["b"], "doc_to_target": "c", "process_results": "f"}},
            "another task: this version asks it or reads its answers otherwise (filter_list, process_results); set",
        ),
        ({}, {"task": {"filter_list": ["b"]}}, "reads its answers otherwise (filter_list); set"),
    ],
    ids=["data not recorded", "data", "from a folder now", "no longer there", "task", "no task recorded"],
)
def test_what_differs_is_said(tmp_path, was, now, said):
    (tmp_path / "settings.json").write_text(json.dumps(was))
    (tmp_path / "answers-0.jsonl").touch()
    with pytest.raises(UserError) as error:
        _same_as_before(tmp_path, now)
    assert said in str(error.value)


def test_the_content_of_a_folder_is_also_what_its_links_lead_to(tmp_path):
    elsewhere, copy = tmp_path / "elsewhere", tmp_path / "copy"
    elsewhere.mkdir()
    copy.mkdir()
    (elsewhere / "rows.jsonl").write_text("1")
    plain = content_digest(copy)
    (copy / "main").symlink_to(elsewhere)
    (copy / "again").symlink_to(elsewhere)
    digests = [plain, content_digest(copy)]
    (elsewhere / "rows.jsonl").write_text("2")
    digests.append(content_digest(copy))
    (copy / "again").unlink()
    digests.append(content_digest(copy))
    assert len(set(digests)) == 4
    (elsewhere / "back").symlink_to(copy)  # a loop, by way of another folder
    (copy / "here").symlink_to(copy)
    (copy / ".cache").symlink_to(tmp_path)
    assert content_digest(copy) == digests[-1]


def test_a_score_is_the_mean_over_questions_and_samples():
    score = score_of(
        [[{"score": 1.0}, {"score": 0.0}, {"score": 0.5}], [{"score": 1.0}, {"score": 1.0}, {"score": 0.1}]]
    )
    assert score.mean == pytest.approx(0.6)
    assert (score.questions, score.samples) == (3, 2)
    assert 0 < score.low < 0.6 < score.high < 1


def test_wilson_intervals():
    """Against the closed form's roots: the shares whose distance from the observed one is 1.96 standard errors."""
    for right, count in [(0, 8), (3, 8), (8, 8), (880, 1319)]:
        share = right / count
        low, high = wilson(share, count)
        assert low <= share <= high
        for edge in {low, high} - {0.0, 1.0}:
            assert abs(share - edge) == pytest.approx(1.959964 * (edge * (1 - edge) / count) ** 0.5, rel=1e-5)


def test_the_table_stands_beside_published_rows_with_empty_cells(settings_file, tmp_path):
    settings = load_settings(settings_file(), [])
    scores = {"gsm8k": score_of([[{"score": 1.0}, {"score": 0.0}]])}
    lines = terminal_table(settings, scores).splitlines()
    row = next(line for line in lines if line.startswith("GSM8K"))
    assert row.split() == ["GSM8K", "Acc", "50.00", "(9.5–90.5)", "66.72", "82.76"]
    assert next(line for line in lines if line.startswith("GPQA")).split() == ["GPQA-Diamond", "Pass@1", "50.51"]
    assert next(line for line in lines if line.startswith("average")).split()[-5:] == [
        "63.90",
        "56.28",
        "64.37",
        "68.73",
        "63.69",
    ]
    (tmp_path / "out").mkdir()
    write_results(settings, scores, {"config.json": "aa"}, "0.4.13")
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["benchmarks"]["gsm8k"]["score"] == 0.5
    assert written["average"] is None
    page = (tmp_path / "out" / "results.html").read_text()
    assert "50.00 (9.5–90.5)" in page
    assert all(row.source.split(":")[0] in page for row in PUBLISHED)
    assert "http" not in page.replace("http-equiv", "")


def test_an_average_needs_all_eleven_in_full(settings_file, questions):
    everything = {name: {} for name in BENCHMARKS}
    score = score_of([[{"score": 0.25}]])
    path = settings_file(benchmarks=everything, run_code_of=["mbpp", "humaneval"])
    assert average(load_settings(path, []), dict.fromkeys(BENCHMARKS, score)) == 0.25
    assert average(load_settings(path, ["benchmarks.drop.questions=5"]), dict.fromkeys(BENCHMARKS, score)) is None


def test_published_figures_agree_with_each_other():
    """The card's mean of ten, and what the paper's average leaves for the five benchmarks that were not found."""
    card = next(row for row in PUBLISHED if row.name == "1B V1.0")
    assert sum(card.scores.values()) / 10 == pytest.approx(57.86, abs=0.01)
    final = next(row for row in PUBLISHED if row.name == "NPD+GRPO")
    assert 11 * final.average - sum(final.scores.values()) == pytest.approx(362.5, abs=0.1)
    sft, npd = (next(row for row in PUBLISHED if row.name == name) for name in ("SFT", "NPD"))
    assert npd.average - sft.average == pytest.approx(8.09)


def test_two_evaluations_do_not_share_a_folder(tmp_path):
    with (
        only_process(tmp_path / "eval.lock", "busy"),
        pytest.raises(UserError, match="busy"),
        only_process(tmp_path / "eval.lock", "busy"),
    ):
        pass
    with only_process(tmp_path / "eval.lock", "busy"):  # free again
        pass
