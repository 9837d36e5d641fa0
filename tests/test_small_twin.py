"""configs/repro/small_cpu: SFT, NPD and GRPO on tasks of reasoning-gym, with its scorers as the reward."""

import json

import pytest
from command import npd
from conftest import CONFIGS

from npd_ascend.config import load_config
from npd_ascend.metrics import read_metrics
from npd_ascend.prompts import read_prompts
from npd_ascend.stream import read_table
from npd_ascend.tokenizer import ChatTokenizer

pytest.importorskip("reasoning_gym", reason="pip install -r requirements-rewards.txt")

FOLDER = CONFIGS / "repro" / "small_cpu"


def test_what_trains_and_what_scores_share_no_question():
    """Those of the teacher too."""
    run, teacher = (load_config(FOLDER / name) for name in ("run.yaml", "teacher.yaml"))
    tokenizer = ChatTokenizer(run.student.path)
    roles = [(run.data, role) for role in ("gold", "prompts", "problems", "heldout")] + [(teacher.data, "gold")]
    asked = [{p.text for p in read_prompts(data, role, tokenizer, max_prompt_tokens=50)} for data, role in roles]
    assert [len(texts) for texts in asked] == [600, 2000, 4000, 1000, 20000]
    assert len(set.union(*asked)) == sum(map(len, asked))


@pytest.mark.slow
def test_the_scorers_of_reasoning_gym_reward_it(tmp_path):
    """Words alone, whose scorer gives a share of the letters; NPD is left out here."""
    words = "{kind: reasoning_gym, datasets: [spell_backward], parameters: {spell_backward: {max_word_len: 8}}, "
    few = [f"data.problems={words}first: 2000, count: 40}}", "data.heldout.count=60", "sft.epochs=2"]
    few += ["npd=null", "teacher=null", "data.prompts=null", "grpo.steps=2", "grpo.groups_per_step=16"]
    done = npd("run", "--config", FOLDER / "run.yaml", *few, f"run.folder={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["scores"]["grpo"] is not None
    rewards = read_table(tmp_path / "run" / "grpo").to_pylist()
    assert len(rewards) == 2 * 16 * 16
    assert all(row["why"] == "" for row in rewards)
    tokenizer = ChatTokenizer(FOLDER / "student")
    for row in rewards:
        asked, answered = row["token_ids"][: row["prompt_len"]], row["token_ids"][row["prompt_len"] :]
        word = tokenizer.decode_text(asked).split(": ")[-1].strip().lower()
        share = sum(map(str.__eq__, word[::-1], tokenizer.decode_answer(answered).strip().lower())) / len(word)
        assert row["reward"] == pytest.approx(share) or share == 1 > row["reward"]  # with something behind it
    assert {0.0, 1.0} < {row["reward"] for row in rewards}
    steps = [row for row in read_metrics(tmp_path / "run") if "grpo/reward" in row]
    assert len(steps) == 2
    assert all(row["grpo/no_signal"] < 1 for row in steps)
