"""The schedule with npd.stream: everything is wanted once, nothing is trained on too old, nobody waits for ever."""

import random
from contextlib import closing

import pytest
from conftest import CONFIGS
from hypothesis import given, settings
from hypothesis import strategies as st
from sequential_stream import train

from npd_ascend.config import StreamConfig, load_config
from npd_ascend.errors import UserError
from npd_ascend.metrics import MetricsLog, read_metrics
from npd_ascend.pacing import Pacing, open_pacing, share
from npd_ascend.runfolder import open_run
from npd_ascend.tokenizer import ChatTokenizer

ADDITION = CONFIGS / "addition_cpu.yaml"
SMALL = ["npd.refresh_after=[]", "data.prompts.count=50", "data.heldout.count=10", "rollout.batch_size=8"]


def open_small(*overrides):
    config = load_config(ADDITION, [*SMALL, "npd.epochs=3", "npd.stream={}", *overrides])
    return open_pacing(config, ChatTokenizer(config.student.path))


def test_every_prompt_is_answered_afresh_in_every_epoch():
    pacing = open_small("rollout.samples_per_prompt=2")
    training = [(prompt.prompt_id, index) for shard in pacing.shards[: pacing.training] for prompt, index in shard]
    assert len(training) == 50 * 2 * 3 == len(set(training))
    epochs = [training[at : at + 100] for at in (0, 100, 200)]
    for epoch, wanted in enumerate(epochs):
        assert {index for _, index in wanted} == {2 * epoch, 2 * epoch + 1}
    assert [name for name, _ in epochs[0]] != [name for name, _ in epochs[1]]  # in another order
    assert all(prompt.heldout for shard in pacing.heldout for prompt, _ in pacing.shards[shard])
    assert not any(prompt.heldout for shard in range(pacing.training) for prompt, _ in pacing.shards[shard])
    assert open_small("rollout.samples_per_prompt=2").shards == pacing.shards


def test_steps_take_all_shards_in_order():
    pacing = open_small("npd.stream={shards_per_step: 4}")
    assert [shard for step in range(pacing.steps) for shard in pacing.shards_of(step)] == list(range(pacing.training))
    assert len(pacing.shards_of(pacing.steps - 1)) == pacing.training % 4  # what is left


def test_workers_share_without_rest():
    parts = [share(range(23), worker, 3) for worker in range(3)]
    assert sorted(shard for part in parts for shard in part) == list(range(23)) == share(range(23), None, 3)


def simulate(pacing: Pacing, rng: random.Random, late: bool = False) -> list[int]:
    """Trainer and two generators in a random order of turns; returns the lag of every shard, in the order of training.

    late: with the decision of the next step taken back, as a rule that ignores what the trainer does would.
    """
    stream, version_of, lags = pacing.stream, {}, []
    version = published_at = step = 0
    turns_without_work = 0
    while step < pacing.steps:
        actor = rng.choice(["trainer", "generator", "generator"])
        shards = pacing.shards_of(step)
        if actor == "trainer" and all(shard in version_of for shard in shards):
            lags += [version - version_of[shard] for shard in shards]
            step += 1
            since = step - published_at
            drifted = stream.publish_at_kl is not None and since % stream.publish_not_before == 0 and rng.random() < 0.5
            if since >= stream.publish_every or drifted:
                version, published_at = version + 1, step
        elif actor == "generator":
            waiting = [shard for shard in range(pacing.training) if shard not in version_of][:2]
            free = [s for s in waiting if pacing.may_begin(s, published_at=published_at, steps_done=step + late)]
            if free:
                version_of[rng.choice(free)] = version
            else:
                turns_without_work += 1
                assert turns_without_work < 10_000, "nobody can go on"
    return lags


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shards_per_step=st.integers(1, 3),
    publish_every=st.integers(1, 6),
    max_lag=st.integers(0, 3),
    not_before=st.integers(1, 6) | st.none(),
)
def test_no_sample_is_older_than_the_limit_and_nobody_waits_for_ever(
    seed, shards_per_step, publish_every, max_lag, not_before
):
    drift = {"publish_at_kl": 0.1, "publish_not_before": min(not_before, publish_every)} if not_before else {}
    stream = StreamConfig(shards_per_step=shards_per_step, publish_every=publish_every, max_lag=max_lag, **drift)
    lags = simulate(Pacing([[]] * 30, 30, stream), random.Random(seed))
    assert len(lags) == 30
    assert max(lags) <= max_lag


def test_the_limit_is_used_and_a_rule_that_counts_one_step_too_many_breaks_it():
    stream = StreamConfig(publish_every=5, max_lag=1, publish_at_kl=0.1, publish_not_before=1)
    pacing = Pacing([[]] * 60, 60, stream)
    lags = [simulate(pacing, random.Random(seed)) for seed in range(20)]
    assert max(max(one) for one in lags) == 1
    broken = [simulate(pacing, random.Random(seed), late=True) for seed in range(20)]
    assert max(max(one) for one in broken) > 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["npd.stream={}"], "refresh_after is not for npd.stream"),
        (["npd.refresh_after=[]", "npd.packs_per_step=2", "npd.stream={}"], "packs_per_step is not for npd.stream"),
        (
            ["npd.refresh_after=[]", "npd.stream={publish_at_kl: 0.1, publish_every: 2}"],
            "publish_not_before=4 is above publish_every=2",
        ),
    ],
)
def test_settings_that_contradict_the_stream_are_refused(overrides, said):
    with pytest.raises(UserError, match=said):
        load_config(ADDITION, overrides)


def test_the_resolved_configuration_of_a_stream_is_read_back(tmp_path):
    from npd_ascend.config import dump_config

    config = load_config(ADDITION, [*SMALL, "npd.stream={publish_at_kl: 0.1}"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(("kl", "steps"), [(1e9, [5, 10]), (1e-9, [3, 6, 9])])
def test_the_trainer_publishes_within_the_two_intervals(tmp_path, kl, steps):
    """A student that never drifts so far, and one that always has when somebody looks; twelve steps."""
    stream = f"npd.stream={{publish_every: 5, publish_not_before: 3, publish_at_kl: {kl}}}"
    small = ["data.prompts.count=48", "npd.epochs=2", "device.threads=1", "sft=null", stream]
    run = open_run(load_config(ADDITION, [*SMALL, *small, f"run.folder={tmp_path}"]))
    with closing(MetricsLog(run.path, "npd")) as metrics:
        train(run, metrics)
    rows = read_metrics(run.path)
    assert sum("train/lag" in row for row in rows) == 12
    assert [row["step"] for row in rows if "publish/version" in row] == steps
