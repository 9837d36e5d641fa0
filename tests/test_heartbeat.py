"""Every process that the supervisor watches touches the file that it looks for, and no other."""

import os
from collections import Counter

import pytest
from conftest import CONFIGS

from npd_ascend import heartbeat
from npd_ascend.__main__ import main
from npd_ascend.config import load_config
from npd_ascend.heartbeat import Heartbeat
from npd_ascend.placement import recipe

SMALL = ["data.gold.count=40", "data.prompts.count=20", "data.heldout.count=10", "sft.epochs=1", "device.threads=1"]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_workers_of_a_set_are_heard(workers, tmp_path, monkeypatch):
    beats_of, beat = Counter(), Heartbeat.beat
    monkeypatch.setattr(Heartbeat, "beat", lambda self: beats_of.update([self.path.stem]) or beat(self))
    more = [*SMALL, f"processes={{rollout: {workers}, teacher: {workers}}}", "rollout.batch_size=8"]
    words = ["--config", str(CONFIGS / "addition_cpu.yaml"), f"run.folder={tmp_path / 'run'}", *more]
    assert main(["sft", *words]) == 0
    groups = recipe(load_config(CONFIGS / "addition_cpu.yaml", more))
    watched = [process for group in groups for process in group if process.watched]
    for process in watched[: 2 * workers]:  # of set 0; the last teacher worker waits for nobody, the first decides
        if process.name != "score-0":
            assert main([process.arguments[0], "--run", str(tmp_path / "run"), *process.arguments[1:]]) == 0
    beats = {file.stem for file in (tmp_path / "run" / "logs").glob("*.beat")}
    assert beats == {process.name for process in watched} - {"score-0"}
    answers = 20 + 10
    assert sum(count for name, count in beats_of.items() if name.startswith("rollout")) > answers


def test_beats_in_quick_succession_touch_the_file_once(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now)
    beating = Heartbeat(tmp_path / "beat")
    os.utime(beating.path, (1, 1))
    now += 0.01
    beating.beat()
    assert beating.path.stat().st_mtime == 1
    now += 0.1
    beating.beat()
    assert beating.path.stat().st_mtime > 1
