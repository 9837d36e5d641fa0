"""The line beside the bar, and the table of what new weights cost, against sums by hand."""

import json

import pytest

from npd_ascend.busy import sync_split
from npd_ascend.status import Status, describe

ROWS = [
    {"stage": "rollout-0", "rollout/tokens": 300, "rollout/busy_s": 3.0, "rollout/load_s": 9.0, "rollout/wait_s": 0.0},
    {"stage": "rollout-0", "rollout/tokens": 500, "rollout/busy_s": 3.0, "rollout/load_s": 0.0, "rollout/wait_s": 6.0},
    {"stage": "rollout-0", "rollout/tokens": 0, "rollout/busy_s": 0.0, "rollout/load_s": 0.5, "rollout/wait_s": 0.0},
    {"stage": "score", "score/tokens": 1000, "score/busy_s": 1.0, "score/wait_s": 3.0, "filter/kept": 0.9},
    {"stage": "score", "filter/kept": 0.8},
    {"stage": "npd", "train/tokens": 700, "train/busy_s": 2.0, "train/wait_s": 0.5, "train/lag": 1.0, "pack/fill": 0.5},
    {"stage": "npd", "train/drift": 0.021},
    {"stage": "npd", "publish/version": 1, "publish/busy_s": 0.25},
]


def test_a_line_is_means_rates_and_shares():
    assert describe(ROWS, 10.0) == (
        "lag 1.0, KL 0.021, kept 85%, packs full 50%; tokens/s generated 80, scored 100, trained 70; "
        "busy rollout-0 28%, score 25%, npd 73%; a version, s: publish 0.25, load 4.75"
    )
    assert describe([], 10.0) == ""


def test_only_what_is_new_is_read_and_a_torn_line_waits(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n")
    status = Status(tmp_path, every_s=0.0)
    assert status.line() is None
    whole, torn = json.dumps(ROWS[4]) + "\n", json.dumps({"stage": "score", "filter/kept": 0.6}) + "\n"
    with file.open("a") as out:
        out.write(whole + torn[:9])
        out.flush()
        assert status.line() == "kept 80%"
        out.write(torn[9:])
    assert status.line() == "kept 60%"
    assert status.line() is None
    with file.open("a") as out:
        out.write(whole[:9] + whole + torn)  # a writer was killed, and the next one came
    assert status.line() == "kept 60%"
    assert Status(tmp_path, every_s=1000.0).line() is None


def test_what_new_weights_cost_leaves_out_the_start_of_an_engine():
    split = {part["what"]: part for part in sync_split([*ROWS, {"stage": "rollout-1", "rollout/load_s": 20.0}])}
    assert [(part["count"], part["mean"]) for part in split.values()] == [(1, 0.25), (1, 0.5)]
    received = {"sync/wait_s": 0.1, "sync/transfer_s": 0.2, "sync/load_s": 0.3, "sync/reset_s": 0.01}
    more = sync_split([{"stage": "rollout-0", **received}, {"stage": "rollout-0", "sync/load_s": 0.5}])
    assert more[2]["mean"] == pytest.approx(0.4)
    assert more[2]["most"] == 0.5
    assert len(more) == 4
