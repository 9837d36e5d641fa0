"""Prompt files: what is wrong is told with the line; what is right is the same every time."""

import json
import subprocess
import sys

import pytest
from conftest import CONFIGS
from transformers import AutoTokenizer

from npd_ascend.config import AdditionSource, DataConfig, JsonlSource, ReasoningGymSource
from npd_ascend.errors import UserError
from npd_ascend.prompts import read_prompts
from npd_ascend.tokenizer import ChatTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return ChatTokenizer(CONFIGS / "addition" / "student")


def _read(tokenizer, path, **changes):
    source = JsonlSource(kind="jsonl", path=path, **changes)
    return read_source(source, tokenizer)


def read_source(source, tokenizer, role="prompts", max_prompt_tokens=12):
    data = DataConfig(**{"heldout": source, role: source})
    return read_prompts(data, role, tokenizer, max_prompt_tokens=max_prompt_tokens)


def test_a_tokenizer_without_code_of_its_own_is_read_without_the_model_classes(tokenizer):
    """As AutoTokenizer reads it, which takes three seconds longer to import."""
    folder = CONFIGS / "addition" / "student"
    auto = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer._tokenizer) is type(auto)
    assert tokenizer._tokenizer.init_kwargs == auto.init_kwargs
    code = f"""
import sys
from pathlib import Path
from npd_ascend.tokenizer import ChatTokenizer
ChatTokenizer(Path({str(folder)!r})).encode_prompt("1+1=")
assert "transformers.generation.utils" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lines_become_prompts(tokenizer, tmp_path):
    file = tmp_path / "sums.jsonl"
    file.write_text('{"prompt": "1+1", "answer": "2"}\n\n{"prompt": "12+3"}\n')
    one, two = _read(tokenizer, file)
    assert (one.prompt_id, one.text, one.answer) == ("prompts:sums:1", "1+1", "2")
    assert (two.prompt_id, two.answer) == ("prompts:sums:3", None)
    assert tokenizer.decode_answer(two.token_ids) == "12+3="
    assert [p.prompt_id for p in _read(tokenizer, file, first=1, count=1)] == ["prompts:sums:3"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "sums.jsonl:2: not JSON"),
        ("[1]", "sums.jsonl:2: no text under 'prompt'"),
        ('{"prompt": ""}', "sums.jsonl:2: no text under 'prompt'"),
        ('{"question": "1"}', "sums.jsonl:2: no text under 'prompt'"),
        ('{"prompt": "1+1", "answer": 2}', "sums.jsonl:2: 'answer' is not a text"),
        (json.dumps({"prompt": "1+" * 9}), "sums.jsonl:2 has 20 tokens, but only 12 fit"),
    ],
)
def test_a_bad_line_is_told_with_its_number(tokenizer, tmp_path, line, said):
    file = tmp_path / "sums.jsonl"
    file.write_text('{"prompt": "1+1"}\n' + line + "\n")
    with pytest.raises(UserError) as error:
        _read(tokenizer, file)
    assert said in str(error.value)


def test_files_of_one_name_stay_apart_and_one_row_twice_is_refused(tokenizer, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "1+1"}\n')
    source = JsonlSource(kind="jsonl", path=file)
    prompts, heldout = (read_source(source, tokenizer, role) for role in ("prompts", "heldout"))
    assert prompts[0].prompt_id != heldout[0].prompt_id
    twice = ReasoningGymSource(kind="reasoning_gym", datasets=("chain_sum", "chain_sum"), count=4)
    with pytest.raises(UserError, match=r"chain_sum\[0\] comes twice"):
        read_source(twice, tokenizer, max_prompt_tokens=10_000)


def gym(tokenizer, datasets, first, count, **parameters):
    pytest.importorskip("reasoning_gym", reason="pip install -r requirements-rewards.txt")
    source = ReasoningGymSource(
        kind="reasoning_gym", datasets=datasets, parameters=parameters, first=first, count=count
    )
    return read_source(source, tokenizer, max_prompt_tokens=10_000)


SUMS = {"chain_sum": {"max_terms": 2, "max_digits": 1}}  # 200 questions at most


def test_no_question_of_reasoning_gym_comes_twice(tokenizer):
    """Nor in two sources whose ranges are apart, which is how what is trained and what is held out stay apart."""
    names = ("chain_sum", "spell_backward")
    whole = gym(tokenizer, names, 0, 240, **SUMS)
    assert len({prompt.text for prompt in whole}) == 240
    assert {len(prompt.text.split(":")[1].split()) for prompt in whole[::2]} == {4}  # "3 + 4 ="
    parts = gym(tokenizer, names, 0, 90, **SUMS) + gym(tokenizer, names, 90, 150, **SUMS)
    assert [(p.text, p.answer) for p in parts] == [(p.text, p.answer) for p in whole]
    assert len({p.prompt_id for p in parts}) == 240


def test_a_set_of_reasoning_gym_that_has_no_more_says_how_many(tokenizer):
    with pytest.raises(UserError, match=r"chain_sum has no more than 200 different .* first \+ count ask for 300"):
        gym(tokenizer, ("chain_sum",), 10, 290, **SUMS)


@pytest.mark.parametrize(
    ("datasets", "parameters", "said"),
    [
        (("chain_suns",), {}, "chain_suns: Dataset 'chain_suns' not registered"),
        (("chain_sum",), {"chain_sum": {"terms": 2}}, "unexpected keyword argument 'terms' (TypeError); mend datasets"),
        (("chain_sum",), {"chain_sum": {"max_terms": 1}}, "max_terms must be >= min_terms (AssertionError); mend"),
        (("spell_backward",), {"spell_backward": {"min_word_len": 40, "max_word_len": 50}}, "(IndexError); mend"),
    ],
)
def test_what_reasoning_gym_does_not_take_is_told(tokenizer, datasets, parameters, said):
    with pytest.raises(UserError, match=r"reasoning_gym: (chain_su|spell)") as error:
        gym(tokenizer, datasets, 0, 4, **parameters)
    assert said in str(error.value)


def test_other_line_separators_of_unicode_do_not_end_a_line(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "1+1", "note": "a\u2028b"}, ensure_ascii=False) + "\n")
    assert [prompt.text for prompt in _read(tokenizer, tmp_path / "a.jsonl")] == ["1+1"]


def test_missing_empty_and_short_files(tokenizer, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        _read(tokenizer, tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"empty.jsonl gives no prompt"):
        _read(tokenizer, tmp_path / "empty.jsonl")
    (tmp_path / "one.jsonl").write_text('{"prompt": "1+1"}\n')
    with pytest.raises(UserError, match="has 1 prompts, but first \\+ count ask for 5"):
        _read(tokenizer, tmp_path / "one.jsonl", count=5)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a UTF-8 text"):
        _read(tokenizer, tmp_path / "binary.jsonl")


def test_sft_needs_answers(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "1+1"}\n')
    source = JsonlSource(kind="jsonl", path=tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"a.jsonl:1 has no answer, and SFT needs one"):
        read_source(source, tokenizer, "gold")


def test_slices_of_addition_do_not_meet(tokenizer):
    def texts(first, count):
        source = AdditionSource(kind="addition", first=first, count=count)
        return [p.text for p in read_source(source, tokenizer, max_prompt_tokens=60)]

    assert len(set(texts(0, 500) + texts(500, 500))) == 1000
    assert texts(0, 500)[100:200] == texts(100, 100)
    with pytest.raises(UserError, match="only 810000 sums"):
        texts(809_999, 2)


def test_the_tokenizer_and_its_header(tokenizer):
    assert tokenizer.decode_answer(tokenizer.encode_answer("1042")) == "1042"
    assert tokenizer.encode_answer("7")[-1] == tokenizer.eos_id
    bos, *header = tokenizer.alone_context("assistant_header")
    prompt = tokenizer.encode_prompt("1+1")
    assert (bos, *header) == (prompt[0], prompt[-1])  # the template writes BOS in front and "=" behind
    assert tokenizer.alone_context("bos") == (bos,)
    assert tokenizer.difference(ChatTokenizer(CONFIGS / "addition" / "teacher")) is None


@pytest.mark.parametrize("damage", ["vocabulary", "template", "no template", "no tokenizer"])
def test_tokenizers_that_disagree_are_told_apart(tokenizer, addition_student, damage):
    if damage == "vocabulary":
        file = addition_student / "tokenizer.json"
        swapped = json.loads(file.read_text())
        vocab = swapped["model"]["vocab"]
        vocab["3"], vocab["4"] = vocab["4"], vocab["3"]
        file.write_text(json.dumps(swapped))
        assert "token '3' is" in tokenizer.difference(ChatTokenizer(addition_student))
    elif damage == "template":
        file = addition_student / "chat_template.jinja"
        file.write_text("{{ bos_token }}+=")
        assert "render differently" in tokenizer.difference(ChatTokenizer(addition_student))
    elif damage == "no template":
        (addition_student / "chat_template.jinja").unlink()
        with pytest.raises(UserError, match="no chat_template"):
            ChatTokenizer(addition_student)
    else:
        (addition_student / "tokenizer_config.json").unlink()
        with pytest.raises(UserError, match=r"tokenizer_config.json: no such file"):
            ChatTokenizer(addition_student)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("tokenizer.json", None, "tokenizer.json: no such file"),
        ("tokenizer.json", "{", "tokenizer.json: not JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: want an object of settings"),
        ("tokenizer.json", "{}", "no tokenizer can be made of it"),
    ],
)
def test_a_damaged_tokenizer_is_named(addition_student, name, text, said):
    file = addition_student / name
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(UserError, match=said) as error:
        ChatTokenizer(addition_student)
    assert "\n" not in str(error.value)
