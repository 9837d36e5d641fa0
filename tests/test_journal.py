"""The journal of a shard: what is read again is what was written, and nothing else is."""

import resource
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import CONFIGS
from safetensors.torch import load_file, save_file

from npd_ascend.config import load_config
from npd_ascend.errors import UserError
from npd_ascend.prompts import wanted_shards
from npd_ascend.rollout.engine import Completion
from npd_ascend.rollout.journal import Journal, begun_shards, drop_committed, journal_path, read_journal
from npd_ascend.rollout.worker import Maker
from npd_ascend.runfolder import open_run

# each has bits that decimals lose, or that look like an end of line
LOGPROBS = [[-0.1, -1e-38, np.float32(-1) / 3], [struct.unpack("<f", b"\r\n\x0a\xbf")[0]], [0.0, -0.0]]
ANSWERS = [Completion(tuple(range(len(p))), np.array(p, np.float32), "stop") for p in LOGPROBS]


@pytest.fixture
def path(tmp_path):
    """Of a shard of three answers, of which the last ended first."""
    path = journal_path(tmp_path / "stream", 4, 7)
    with Journal(path, "asked") as journal:
        for index in (2, 0, 1):
            journal.add(index, ANSWERS[index])
    return path


def assert_kept(journal: Journal, wanted: list[int]) -> None:
    assert list(journal.kept) == wanted
    for index, answer in journal.kept.items():
        assert (answer.token_ids, answer.finish_reason) == (ANSWERS[index].token_ids, "stop")
        assert answer.logprobs.tobytes() == ANSWERS[index].logprobs.tobytes()


def test_what_was_written_is_there_bit_for_bit(path):
    with Journal(path, "asked") as journal:
        assert_kept(journal, [2, 0, 1])


def test_every_tear_keeps_the_answers_before_it_and_is_written_over(path, caplog):
    data = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(data) if byte == ord("\n")]
    for size in range(len(data)):
        path.write_bytes(data[:size])
        whole = max(0, sum(end <= size for end in ends) - 1)
        caplog.clear()
        with Journal(path, "asked") as journal:
            assert_kept(journal, [2, 0, 1][:whole])
            for index in [2, 0, 1][whole:]:
                journal.add(index, ANSWERS[index])
        assert path.read_bytes() == data
        said = f"torn or damaged after {whole} answers" in caplog.text
        assert said == (size > 0 and size not in ends)


def test_a_flipped_bit_ends_what_is_read(path, caplog):
    data = path.read_bytes()
    lines = [data[:at].count(b"\n") for at in range(len(data))]
    for at, line in enumerate(lines):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        asked, answers, _ = read_journal(path)
        assert asked == ("asked" if line else "")
        assert list(answers) == [2, 0, 1][: max(0, line - 1)]
    assert caplog.text.count("torn or damaged") == len(data)


def test_a_disk_that_takes_a_part_of_a_line_is_full(path):
    """As it takes it: without an error, that of the next write."""
    data, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(path, "asked") as journal:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(data) + 20, limits[1]))
        try:
            with pytest.raises(UserError, match="full"):
                journal.add(3, ANSWERS[0])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(path.read_bytes()) == len(data) + 20
    with Journal(path, "asked") as journal:
        assert_kept(journal, [2, 0, 1])


def test_a_shard_goes_on_with_the_weights_that_it_was_begun_with_or_anew(tmp_path, caplog):
    """Those of the student as given, which has no version of its own."""
    student = Path(shutil.copytree(CONFIGS / "addition" / "teacher", tmp_path / "student"))
    asked = ["sft=null", "data.gold=null", f"student.path={student}", "student.init=pretrained"]
    run = open_run(load_config(CONFIGS / "addition_cpu.yaml", [*asked, f"run.folder={tmp_path / 'run'}"]))
    shards = wanted_shards(run.config, run.tokenizer(), 0)
    maker = Maker(run, SimpleNamespace(separable=True), shards, "rollout", "rollout")
    path = journal_path(run.stream.folder, 0, 7)
    with Journal(path, maker._asked(7, 0)) as journal:
        assert maker.begun(6) is None
        journal.add(0, ANSWERS[0])
    assert maker.begun(7) == 0
    weights = load_file(student / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, student / "model.safetensors")
    assert maker.begun(7) is None
    assert (
        "its 1 answers are lost, since weight version 0, with which they were made, is gone or another" in caplog.text
    )
    Journal(path, maker._asked(7, 0)).__exit__(None, None, None)
    assert maker.begun(7) is None  # begun by one that has answered nothing yet
    assert not path.exists()
    maker.metrics.close()


def test_answers_to_other_requests_are_not_taken(path, caplog):
    with Journal(path, "asked of others") as journal:
        assert journal.kept == {}
        journal.add(1, ANSWERS[1])
    assert "begun with other weights or requests; its 3 answers are lost" in caplog.text
    with Journal(path, "asked of others") as journal:
        assert_kept(journal, [1])


def test_what_is_left_of_committed_shards_goes_away(tmp_path):
    stream = tmp_path / "stream"
    for number, shard in ((0, 1), (0, 2), (3, 2), (3, 100_000)):
        Journal(journal_path(stream, number, shard), "asked").__exit__(None, None, None)
    (stream / ".rollouts-v0-00002.parquet.draft").touch()

    def left() -> list[tuple[int, int]]:
        return [(begun.number, begun.shard) for begun in begun_shards(stream)]

    assert [(begun.number, begun.shard) for begun in begun_shards(stream, 2)] == [(0, 2), (3, 2)]
    drop_committed(stream, {2, 9}, 0)
    assert left() == [(0, 1), (3, 2), (3, 100_000)]
    drop_committed(stream, {2, 100_000})
    assert left() == [(0, 1)]
    assert (stream / ".rollouts-v0-00002.parquet.draft").exists()
