"""GRPO as a stage of a run: real processes, kills, rewards that fail, and that the reward rises."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command import npd, npd_here
from conftest import CONFIGS
from safetensors.torch import load_file
from test_live import soak  # noqa: F401

from npd_ascend.config import load_config
from npd_ascend.errors import UserError
from npd_ascend.metrics import read_metrics
from npd_ascend.prompts import grpo_shards
from npd_ascend.records import Reward, Rollout, sample_id
from npd_ascend.rewards.worker import Judge, run_rewards
from npd_ascend.runfolder import open_run
from npd_ascend.stream import read_table
from npd_ascend.tokenizer import ChatTokenizer
from npd_ascend.trainer.grpo import _advantages

CONFIG = CONFIGS / "addition_grpo.yaml"
SMALL = [
    "data.gold.count=200",
    "data.heldout.count=60",
    "sft.epochs=6",
    "rollout.batch_size=32",
    "grpo.steps=6",
    "grpo.groups_per_step=16",
    "grpo.group_size=4",
    "grpo.publish_every=2",
    "grpo.kl_weight=0.01",
    "grpo.rewards={exact_match: 1, format: 0.5}",
    "grpo.format='[0-9]{4}'",  # a few answers have it from the start, so that there is something to learn
    "grpo.checkpoint_every_steps=1",
    "grpo.optimizer.lr=6e-4",
    "evaluate.every_steps=4",
]


def settings(folder: Path, *more: str) -> list[str]:
    return ["--config", str(CONFIG), f"run.folder={folder}", *SMALL, *more]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.temperature=0.8"], "rollout.temperature=0.8 and top_p=1.0 with grpo"),
        (["rollout.batch_size=8"], "rollout.batch_size=8 is below grpo.group_size=16"),
        (["grpo.rewards={reasoning_gym: 1}"], "data.problems is of kind addition"),
        (["grpo.rewards={format: 1}"], "rewards.format and format"),
        (["grpo.rewards={format: 1}", "grpo.format='('"], "is no regular expression"),
        (["grpo.rewards={taste: 1}"], "exact_match"),
        (["grpo.group_size=1"], "grpo.group_size"),
        (["data.problems=null"], "grpo needs rollout and data.problems"),
        (["grpo.stream={}"], "unknown key grpo.stream"),
    ],
)
def test_what_does_not_fit_is_said(overrides, said):
    with pytest.raises(UserError) as error:
        load_config(CONFIG, overrides)
    assert said in str(error.value)


def test_groups_stand_together_and_every_step_has_as_many():
    config = load_config(CONFIG, [*SMALL, "data.problems.count=40", "rollout.batch_size=26"])
    shards = grpo_shards(config, ChatTokenizer(config.student.path))
    assert [len(shard) for shard in shards] == [24, 24, 16] * 6
    names = []
    for shard in shards:
        for at in range(0, len(shard), 4):
            group = shard[at : at + 4]
            assert len({prompt.prompt_id for prompt, _ in group}) == 1
            names += [(prompt.prompt_id, index) for prompt, index in group]
    assert len(set(names)) == len(names)  # a problem that comes again is answered anew


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("grpo") / "run"
    done = npd("run", *settings(folder))
    assert done.returncode == 0, done.stderr
    assert "mean reward" in done.stdout
    return folder


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(reference):
    summary = json.loads((reference / "summary.json").read_text())
    assert summary["scores"]["sft"] is not None
    assert summary["scores"]["grpo"] is not None
    assert summary["grpo"].keys() >= {"reward", "no_signal", "failed", "clipped", "kl", "entropy", "answer_tokens"}
    heldout = [row for row in read_metrics(reference) if "heldout/exact_match" in row]
    assert [row["step"] for row in heldout if row["stage"] == "grpo"] == [0, 4, 6]
    for stage in ("sft", "grpo"):
        last = [row["heldout/exact_match"] for row in heldout if row["stage"] == stage][-1]
        assert last == pytest.approx(summary["scores"][stage], abs=1e-6), stage
    assert all(1 < row["rollout/answer_tokens"] < 7 for row in read_metrics(reference) if "rollout/tokens" in row)
    rows = [row for row in read_metrics(reference) if row["stage"] == "grpo" and "grpo/reward" in row]
    assert [row["step"] for row in rows] == list(range(6))
    table = read_table(reference / "grpo")
    assert table.num_rows == 6 * 16 * 4
    assert set(table["reward"].to_pylist()) <= {0.0, 0.5, 1.0, 1.5}
    tokens = sum(len(answer) for answer in table["logprobs"].to_pylist())
    assert json.loads((reference / "summary.json").read_text())["tokens"]["rolled_out"] == tokens
    steps = [version // 2 for version in range(6)]  # on-policy: two steps on each version, none behind it
    assert sorted(table["weight_version"].to_pylist()) == sorted(step for step in steps for _ in range(64))
    assert "Groups without signal" in (reference / "report.html").read_text()


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_equal_bits(reference, tmp_path):
    """SFT is done; tests/test_run.py kills that."""
    folder, kills = tmp_path / "run", 0
    shutil.copytree(reference / "grpo" / "weights" / "v0", folder / "grpo" / "weights" / "v0")
    for after in (6, 9, 11):
        command = [sys.executable, "-m", "npd_ascend", "run", *settings(folder)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(after)
        kills += process.poll() is None
        process.kill()
        process.wait()
    done = npd("run", *settings(folder))
    assert done.returncode == 0, done.stderr
    assert kills
    model = Path("student") / "model.safetensors"
    assert (folder / model).read_bytes() == (reference / model).read_bytes()


@pytest.mark.slow
def test_the_soak_sees_what_it_looks_for_in_grpo_too(soak, reference, tmp_path):  # noqa: F811
    assert soak.check(reference) == []
    folder = Path(shutil.copytree(reference, tmp_path / "run"))
    packs = folder / "grpo" / "stream" / "packs.jsonl"
    first, *rest = packs.read_text().splitlines()
    step = json.loads(first)
    packs.write_text("\n".join([json.dumps(step | {"packs": step["packs"][1:]}), *rest]) + "\n")
    assert any("trained" in fault for fault in soak.check(folder))


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (1, 2)])
def test_several_ranks_give_the_student_of_one(reference, tmp_path, tp, dp):
    """Trained again on the same answers and rewards: weights within 1e-3, which is fp32 rounding after six steps."""
    folder = tmp_path / "run"
    shutil.copytree(reference / "grpo" / "stream", folder / "grpo" / "stream")
    shutil.copytree(reference / "grpo" / "weights" / "v0", folder / "grpo" / "weights" / "v0")
    (folder / "logs").mkdir()
    config = (reference / "config.yaml").read_text()
    assert "  tp: 1\n  dp: 1\n" in config
    (folder / "config.yaml").write_text(config.replace("  tp: 1\n  dp: 1\n", f"  tp: {tp}\n  dp: {dp}\n"))
    done = npd_here("grpo", "--run", folder)
    assert done.returncode == 0, done.stderr
    start, wanted, got = (
        load_file(path / "model.safetensors")
        for path in (reference / "grpo" / "weights" / "v0", reference / "student", folder / "student")
    )
    for name, value in wanted.items():
        assert (got[name] - value).norm() <= 1e-3 * value.norm(), name
    moved = [float((wanted[name] - start[name]).norm() / start[name].norm()) for name in wanted]
    assert max(moved) > 1e-2, moved  # a step left out, or a gradient that one rank did not add, would be seen
    for name, within in (("grpo/reward", 1e-9), ("train/loss", 1e-3), ("grpo/kl", 1e-3), ("heldout/exact_match", 0.02)):
        there, here = (
            [row[name] for row in read_metrics(path) if row["stage"] == "grpo" and name in row]
            for path in (reference, folder)
        )
        assert here == pytest.approx(there, abs=within), name


def answered(tokenizer, shard, texts) -> list[Rollout]:
    rollouts = []
    for (prompt, index), text in zip(shard, texts, strict=True):
        answer = tokenizer.encode_answer(text)
        rollouts.append(
            Rollout(
                sample_id=sample_id(prompt.prompt_id, index, 0),
                prompt_id=prompt.prompt_id,
                weight_version=0,
                heldout=False,
                token_ids=prompt.token_ids + answer,
                prompt_len=len(prompt.token_ids),
                logprobs=np.zeros(len(answer), np.float32),
                finish_reason="stop",
            )
        )
    return rollouts


def test_a_reward_that_hangs_is_counted_and_named_and_leaves_its_group(tmp_path, caplog):
    """A pattern that backtracks for ever on one answer of the first group; the three others are judged."""
    overrides = ["grpo.rewards={format: 1}", "grpo.format='(1+)+2'", "grpo.steps=1", "grpo.groups_per_step=1"]
    run = open_run(load_config(CONFIG, [*SMALL, *overrides, "grpo.reward_timeout_s=1.0", f"run.folder={tmp_path}/run"]))
    tokenizer = ChatTokenizer(run.config.student.path)
    (wanted,) = grpo_shards(run.config, tokenizer)
    rollouts = answered(tokenizer, wanted, ["12", "1" * 40, "3", "112"])
    run.for_grpo().stream.commit("rollouts", 0, 0, rollouts)
    with caplog.at_level("WARNING"):
        run_rewards(run)
    rewards = run.for_grpo().stream.read("rewards", 0)
    assert [reward.reward for reward in rewards] == [1.0, None, 0.0, 1.0]
    assert rewards[1].why.startswith("timeout: no reward within 1 s")
    assert f"no reward for {rollouts[1].sample_id}: timeout" in caplog.text
    (row,) = read_metrics(run.path)
    assert (row["reward/failed"], row["reward/timeouts"]) == (1, 1)
    half = 0.5**0.5
    assert _advantages(rewards, 4) == [pytest.approx(half), None, pytest.approx(-2 * half), pytest.approx(half)]


SPEAKING, EQUAL = [1.0, 0.0, 0.5, 0.0], [1.0] * 4


def trained_with(folder: Path, silent: list[str]):
    """Three steps of two groups on weights of one version; what says nothing are the answers in `silent`."""
    more = ["sft=null", f"student.path={CONFIGS / 'addition' / 'teacher'}", "student.init=pretrained"]
    more += ["grpo.steps=3", "grpo.groups_per_step=2", "grpo.publish_every=3", "grpo.kl_weight=0.5"]
    more += ["grpo.normalise=token"]  # what is left out is then seen in the divisor too
    run = open_run(load_config(CONFIG, [*(s for s in SMALL if "sft" not in s), *more, f"run.folder={folder}"]))
    tokenizer, stream = ChatTokenizer(run.config.student.path), run.for_grpo().stream
    steps = [(SPEAKING, SPEAKING), (SPEAKING, EQUAL), (EQUAL, EQUAL)]
    for step, (shard, groups) in enumerate(zip(grpo_shards(run.config, tokenizer), steps, strict=True)):
        texts = [text for group in groups for text in (silent if group is EQUAL else ["12", "1", "3456", "789"])]
        rollouts = answered(tokenizer, shard, texts)
        rewards = [
            Reward(sample_id=rollout.sample_id, weight_version=0, reward=reward, why="")
            for rollout, reward in zip(rollouts, [*groups[0], *groups[1]], strict=True)
        ]
        for kind, rows in (("rollouts", rollouts), ("rewards", rewards)):
            stream.commit(kind, 0, step, rows)
    done = npd_here("grpo", "--run", folder)
    assert done.returncode == 0, done.stderr
    return run


def test_a_group_of_equal_rewards_trains_nothing_and_is_counted(tmp_path):
    """In a step of which the KL has a gradient too: not by its tokens, nor by how many they are."""
    runs = [trained_with(tmp_path / name, texts) for name, texts in (("a", ["5"] * 4), ("b", ["9876", "7", "86", ""]))]
    one, other = ((run.path / "student" / "model.safetensors").read_bytes() for run in runs)
    assert one == other
    rows = [row for row in read_metrics(runs[0].path) if row["stage"] == "grpo"]
    assert [row["grpo/no_signal"] for row in rows if "grpo/no_signal" in row] == [0, 0.5, 1]
    assert [row["grpo/reward"] for row in rows if "grpo/reward" in row] == [0.375, 0.6875, 1]
    kl = [row["grpo/kl"] for row in rows if "grpo/kl" in row]
    assert len(kl) == 2  # the last step has nothing to train on
    assert kl[1] > 0
    packs = [json.loads(line)["packs"] for line in (runs[0].path / "grpo" / "stream" / "packs.jsonl").open()]
    assert [sum(map(len, step)) for step in packs] == [8, 4, 0]


def test_rewards_that_never_work_stop_the_run(tmp_path):
    run = open_run(load_config(CONFIG, [*SMALL, f"run.folder={tmp_path}/run"]))
    judge = Judge(run, ChatTokenizer(run.config.student.path))
    failed = [Reward(sample_id=str(i), weight_version=0, reward=None, why="raised: no") for i in range(4)]
    with pytest.raises(UserError, match=r"no reward is known of the first 4 answers .raised: no.; mend data.problems"):
        judge.check_first(failed)
    judge.close()


@pytest.mark.slow
def test_the_reward_rises(tmp_path):
    """64 sums again and again, right answers rewarded: the mean reward rises by 0.1 and more."""
    few = ["data.problems.count=64", "grpo.steps=12", "grpo.optimizer.lr=1e-3", "data.heldout.count=60"]
    done = npd("run", "--config", CONFIG, *few, f"run.folder={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    rewards = [row["grpo/reward"] for row in read_metrics(tmp_path / "run") if "grpo/reward" in row]
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.1
