"""Shards and manifest: what was committed is there, what was torn never was."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIGS

from npd_ascend import durable
from npd_ascend.config import load_config
from npd_ascend.durable import commit_file, commit_folder, keep_first, only_process
from npd_ascend.errors import UserError
from npd_ascend.metrics import MetricsLog, read_metrics
from npd_ascend.records import Decision, Rollout, Score, sample_id
from npd_ascend.runfolder import open_run
from npd_ascend.stream import Stream, read_table
from npd_ascend.trainer.samples import kept_samples


def rollout(index: int, answer_len: int = 3, **changes) -> Rollout:
    values = {
        "sample_id": sample_id(f"p{index}", 0, 0),
        "prompt_id": f"p{index}",
        "weight_version": 0,
        "heldout": False,
        "token_ids": tuple(range(2 + answer_len)),
        "prompt_len": 2,
        "logprobs": -np.arange(answer_len, dtype=np.float32),
        "finish_reason": "stop",
    }
    return Rollout(**values | changes)


def score(index: int, answer_len: int = 3) -> Score:
    return Score(
        sample_id=sample_id(f"p{index}", 0, 0),
        weight_version=0,
        teacher_topk_ids=np.arange(answer_len * 2, dtype=np.int32).reshape(-1, 2),
        teacher_topk_logprobs=-np.arange(answer_len * 2, dtype=np.float32).reshape(-1, 2),
        teacher_logprob=-np.arange(answer_len, dtype=np.float32),
        teacher_entropy=0.5,
        teacher_loss=1.0,
        teacher_loss_alone=2.0,
        student_loss=0.5,
        student_loss_alone=2.0,
    )


def decision(index: int) -> Decision:
    return Decision(
        sample_id=sample_id(f"p{index}", 0, 0),
        weight_version=0,
        kept=True,
        reason="kept",
        ifd_teacher=0.5,
        ifd_student=0.25,
        ifd_delta=0.25,
    )


def test_rows_come_back_as_they_went(tmp_path):
    stream = Stream(tmp_path)
    stream.commit("rollouts", 0, 1, [rollout(1, 1)])
    stream.commit("rollouts", 0, 0, [rollout(0), rollout(7, 5, heldout=True, finish_reason="length")])
    stream.commit("scores", 0, 0, [score(0), score(7, 5)])
    back = stream.read("rollouts", 0)
    assert [r.sample_id for r in back] == ["p0/v0/0", "p7/v0/0", "p1/v0/0"]
    assert back[1].token_ids == tuple(range(7))
    assert back[1].heldout
    assert np.array_equal(back[1].logprobs, rollout(7, 5).logprobs)
    got = stream.read("scores", 0)[1]
    assert np.array_equal(got.teacher_topk_ids, score(7, 5).teacher_topk_ids)
    assert np.array_equal(got.teacher_topk_logprobs, score(7, 5).teacher_topk_logprobs)
    assert stream.read("rollouts", 1) == []


def test_an_empty_shard_is_a_shard(tmp_path):
    stream = Stream(tmp_path)
    stream.commit("scores", 0, 0, [])
    assert stream.read("scores", 0) == []
    assert stream.entries("scores", 0)[0].rows == 0


def test_a_set_is_decided_when_every_rollout_of_it_is(tmp_path):
    stream = Stream(tmp_path)
    assert not stream.is_decided(0)
    for shard in range(2):
        stream.commit("rollouts", 0, shard, [rollout(2 * shard), rollout(2 * shard + 1)])
        stream.commit("scores", 0, shard, [score(2 * shard)])
        assert not stream.is_decided(0)
    stream.commit("decisions", 0, 0, [decision(index) for index in range(4)])
    assert stream.is_decided(0)
    assert not stream.is_decided(1)
    lines = stream.manifest.read_text().splitlines(keepends=True)
    # one shard's line is taken out of the manifest, as the message for a damaged one advises
    for gone in (["rollouts"], ["scores"], ["rollouts", "scores"], ["decisions"]):
        left = [line for line in lines if not any(f"{kind}-v0-00000" in line for kind in gone)]
        stream.manifest.write_text("".join(left))
        assert not Stream(tmp_path).is_decided(0), gone


@pytest.mark.parametrize("scored", [3, 4])
def test_scores_of_other_tokens_than_were_generated_are_refused(tmp_path, scored):
    run = open_run(load_config(CONFIGS / "addition_cpu.yaml", [f"run.folder={tmp_path}/run", "teacher.top_k=2"]))
    run.stream.commit("rollouts", 0, 0, [rollout(0), rollout(1)])
    run.stream.commit("scores", 0, 0, [score(0), score(1, scored)])
    run.stream.commit("decisions", 0, 0, [decision(0), decision(1)])
    if scored == 3:
        assert [sample.sample_id for sample in kept_samples(run, 0)] == ["p0/v0/0", "p1/v0/0"]
        return
    with pytest.raises(UserError, match=r"p1/v0/0 of .* has 3 answer tokens and scores of 4"):
        kept_samples(run, 0)


def test_the_stream_is_one_table(tmp_path):
    stream = Stream(tmp_path / "stream")
    stream.commit("rollouts", 0, 0, [rollout(0), rollout(1)])
    stream.commit("scores", 0, 0, [score(1)])
    stream.commit("decisions", 0, 0, [decision(1)])
    rows = read_table(tmp_path).to_pylist()
    assert [row["kept"] for row in rows] == [None, True]
    assert rows[1]["teacher_topk_ids"] == [[0, 1], [2, 3], [4, 5]]


def test_the_table_takes_a_shard_without_rows_and_no_file_without_a_line(tmp_path):
    stream = Stream(tmp_path / "stream")
    stream.commit("rollouts", 0, 0, [rollout(0), rollout(1)])
    stream.commit("scores", 0, 0, [])
    stream.commit("scores", 0, 1, [score(1)])
    stray = tmp_path / "stream" / "rollouts-v0-00007.parquet"
    stray.write_bytes((tmp_path / "stream" / "rollouts-v0-00000.parquet").read_bytes())
    assert [row["teacher_loss"] for row in read_table(tmp_path).to_pylist()] == [None, 1.0]


def test_a_torn_manifest_line_never_was_and_does_not_spoil_the_next(tmp_path):
    stream = Stream(tmp_path)
    stream.commit("rollouts", 0, 0, [rollout(0)])
    with stream.manifest.open("a") as file:
        file.write('{"kind": "rollouts", "version": 0, "sha')
    assert list(stream.entries("rollouts", 0)) == [0]
    stream.commit("rollouts", 0, 1, [rollout(1)])
    assert list(stream.entries("rollouts", 0)) == [0, 1]


def test_a_corrupted_shard_is_named_and_one_that_is_gone_too(tmp_path):
    stream = Stream(tmp_path)
    stream.commit("rollouts", 0, 0, [rollout(0)])
    file = tmp_path / "rollouts-v0-00000.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"rollouts-v0-00000.parquet: differs from the checksum"):
        stream.read("rollouts", 0)
    file.unlink()
    with pytest.raises(UserError, match="is gone"):
        stream.read("rollouts", 0)


@pytest.mark.parametrize(
    "changes",
    [{"prompt_len": 5}, {"prompt_len": 0}, {"logprobs": np.zeros(2, np.float32)}, {"finish_reason": "eos"}],
)
def test_a_rollout_that_contradicts_itself_is_refused(changes):
    with pytest.raises(ValueError, match="p0/v0/0"):
        rollout(0, **changes)


def test_a_torn_row_of_metrics_does_not_take_the_next_along(tmp_path):
    log = MetricsLog(tmp_path, "npd")
    log.log(0, train__loss=3.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1, "stage": "npd", "st')
    log.log(1, train__loss=2.0)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]


def test_metrics_on_a_full_disk_are_said_in_one_line(tmp_path):
    code = f"""
import resource, signal
from pathlib import Path
from npd_ascend.errors import UserError
from npd_ascend.metrics import MetricsLog

log = MetricsLog(Path({str(tmp_path)!r}), "npd")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
try:
    for step in range(9):
        log.log(step, train__loss=1.0)
except UserError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "metrics.jsonl: the disk is full; free some space" in done.stdout, done.stderr


def test_the_first_of_two_who_both_saw_nothing_stands(tmp_path):
    """Each would otherwise see its own. Another is done between this one's look and its draft."""

    class Overtaken(type(Path())):
        def exists(self):
            found = super().exists()
            if not found:
                assert keep_first(Path(self), "first") == "first"
            return found

    assert keep_first(Overtaken(tmp_path / "kept"), "second") == "first"


def test_a_lock_whose_folder_is_removed_just_now_is_taken(tmp_path, monkeypatch):
    made = []

    def make_folder(folder):
        folder.mkdir(exist_ok=True)
        made.append(folder)
        if len(made) == 1:  # by the owner before, who leaves
            folder.rmdir()

    monkeypatch.setattr(durable, "make_folder", make_folder)
    with only_process(tmp_path / "logs" / "run.lock", "busy"):
        assert len(made) == 2


def test_a_lock_that_its_owner_took_away_keeps_out_who_comes_after_who_waited(tmp_path):
    lock, held, done = tmp_path / "logs" / "run.lock", threading.Event(), threading.Event()

    def wait_for_it():
        with only_process(lock, "busy"):
            held.set()
            done.wait()

    with only_process(lock, "busy"):
        waiting = threading.Thread(target=wait_for_it)
        waiting.start()
        assert not held.wait(1)
        lock.unlink()
        lock.parent.rmdir()
    assert held.wait(30)
    try:
        with pytest.raises(UserError, match="busy"), only_process(lock, "busy"):
            pass
    finally:
        done.set()
        waiting.join()


def _fail_half_way(draft):
    (draft / "x" if draft.is_dir() else draft).write_text("half")
    raise RuntimeError


def test_a_block_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), commit_file(tmp_path / "a") as draft:
        _fail_half_way(draft)
    with pytest.raises(RuntimeError), commit_folder(tmp_path / "b") as draft:
        _fail_half_way(draft)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_killed_in_the_middle_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    code = (
        "import os, signal, pathlib; from npd_ascend.durable import commit_file\n"
        f"with commit_file(pathlib.Path({str(tmp_path / 'a')!r})) as draft:\n"
        "    draft.write_text('new'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert (tmp_path / "a").read_text() == "old"
    with commit_file(tmp_path / "a") as draft:
        draft.write_text("newer")
    assert (tmp_path / "a").read_text() == "newer"
