"""The answers of a shard that is not committed yet: what a worker that is killed leaves to the one after it.

RUN/stream/.rollouts-v<N>-<SSSSS>.partial has a line that says what was asked of whom, then one per answer in the order
in which they ended. Every line begins with its checksum, and what follows one that is torn or damaged is not read. No
line is fsynced: a killed process loses none of those it has written, a host that loses power the last ones.
"""

import hashlib
import json
import logging
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np

from npd_ascend.durable import disk_full_is_said, make_folder
from npd_ascend.rollout.engine import Completion

_NAME = re.compile(r"\.rollouts-v(\d+)-(\d+)\.partial")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Begun:
    """A shard that somebody has begun, and may be making still."""

    number: int  # of the set; with npd.stream the weight version
    shard: int
    path: Path


def journal_path(stream: Path, number: int, shard: int) -> Path:
    return stream / f".rollouts-v{number}-{shard:05d}.partial"


def begun_shards(stream: Path, shard: int | None = None) -> Iterator[Begun]:
    """All that have a journal in the folder of a stream, or those of one shard, one per set or weight version."""
    for path in sorted(stream.glob(f".rollouts-v*-{'*' if shard is None else f'{shard:05d}'}.partial")):
        if name := _NAME.fullmatch(path.name):
            yield Begun(int(name[1]), int(name[2]), path)


def drop_committed(stream: Path, committed: Container[int], number: int | None = None) -> None:
    """Delete what is left of shards that are committed, by a process that was killed just then or by another worker.

    number: of the set that they are of; None: with npd.stream, where a shard is made once, whatever the version.
    """
    for begun in begun_shards(stream):
        if begun.shard in committed and number in (None, begun.number):
            begun.path.unlink(missing_ok=True)


def read_journal(path: Path) -> tuple[str, dict[int, Completion], int]:
    """(what was asked of whom, answers by index, bytes that are good); "" if not even the first line is."""
    data = path.read_bytes() if path.exists() else b""
    asked, answers, good = "", {}, 0
    for line in data.split(b"\n")[:-1]:
        checksum, _, content = line.partition(b" ")
        if checksum != _checksum(content):
            break
        if good:
            index, answer = _read_answer(content)
            answers[index] = answer
        else:
            asked = content.decode()
        good += len(line) + 1
    if good < len(data):
        _log.warning("%s: torn or damaged after %d answers", path, len(answers))
    return asked, answers, good


class Journal:
    """Opened for whoever makes the shard. kept: the answers that are in it already, if they are to what is `asked`."""

    def __init__(self, path: Path, asked: str):
        self._path = path
        make_folder(path.parent)
        was, kept, good = read_journal(path)
        if was and was != asked:
            _log.warning("%s: begun with other weights or requests; its %d answers are lost", path, len(kept))
        self.kept = kept if was == asked else {}
        with disk_full_is_said(path):
            self._file: IO[bytes] = path.open("ab", buffering=0)  # what is written outlives this process
        self._file.truncate(good if was == asked else 0)
        if was != asked:
            self._append(asked)
        elif kept:
            _log.info("%s: goes on after %d answers", path, len(kept))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def add(self, index: int, answer: Completion) -> None:
        """Of request number `index`."""
        fields = {
            "index": index,
            "token_ids": answer.token_ids,
            "logprobs": answer.logprobs.astype("<f4").tobytes().hex(),
            "finish_reason": answer.finish_reason,
        }
        self._append(json.dumps(fields))

    def delete(self) -> None:
        """The shard is committed."""
        self._path.unlink(missing_ok=True)

    def _append(self, content: str) -> None:
        line = _checksum(content.encode()) + b" " + content.encode() + b"\n"
        with disk_full_is_said(self._path):
            while line:  # a disk that is nearly full takes a part of it without an error
                line = line[self._file.write(line) :]


def _read_answer(content: bytes) -> tuple[int, Completion]:
    fields = json.loads(content)
    logprobs = np.frombuffer(bytes.fromhex(fields["logprobs"]), "<f4").astype(np.float32)
    return fields["index"], Completion(tuple(fields["token_ids"]), logprobs, fields["finish_reason"])


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[:16].encode()
