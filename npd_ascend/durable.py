"""Files that are there whole or not at all, whatever kills the process that writes them."""

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from npd_ascend.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def make_folder(path: Path) -> None:
    """With its parents, unless it is there; UserError if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: the folder cannot be made ({error.strerror}); name one that can") from None


@contextmanager
def commit_file(path: Path, writer: str = "") -> Iterator[Path]:
    """Yield a draft path; when the block ends the draft becomes `path` in one step, durably.

    writer: tells drafts apart where several processes may write the same file.
    """
    draft = path.with_name(f".{path.name}{writer}.draft")
    with disk_full_is_said(path):
        try:
            make_folder(path.parent)
            yield draft
            _fsync(draft)
            os.rename(draft, path)  # the commit point
            _fsync(path.parent)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


@contextmanager
def commit_folder(path: Path) -> Iterator[Path]:
    """Yield an empty draft folder; when the block ends it becomes `path` in one step, durably."""
    draft = path.with_name(f".{path.name}.draft")
    with disk_full_is_said(path):
        try:
            shutil.rmtree(draft, ignore_errors=True)  # left by a killed process
            make_folder(draft)
            yield draft
            for file in sorted(draft.rglob("*")):
                _fsync(file)
            _fsync(draft)
            os.rename(draft, path)  # the commit point
            _fsync(path.parent)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


def append_line(path: Path, line: str, *, durable: bool = True) -> None:
    """Append one line; several processes may. A torn last line, left by a killed writer, is cut off first.

    durable: it is on the disk when this returns, else when the system writes it.
    """
    with disk_full_is_said(path), path.open("ab+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # ends with the file, and is known on network file systems too
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if file.read() not in (b"", b"\n"):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode() + b"\n")
        if durable:
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def only_process(path: Path, refusal: str) -> Iterator[None]:
    """Hold a lock on the file; UserError(refusal) if a living process has it. The lock dies with its owner."""
    for _ in range(20):  # a killed predecessor may take a moment to be gone
        make_folder(path.parent)
        try:
            file = path.open("w")
        except FileNotFoundError:  # its last owner has removed the folder just now
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.25)
                continue
            # its last owner may have removed it on leaving, and a lock on a removed file keeps nobody out
            if _stands_at(path, file):
                yield
                return
    raise UserError(refusal)


def _stands_at(path: Path, file: IO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def keep_first(path: Path, text: str) -> str:
    """What `path` holds: `text`, unless another process was first. It is there whole or not at all."""
    if not path.exists():
        make_folder(path.parent)
        with path.with_name(f".{path.name}.lock").open("w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)  # as in append_line
            if not path.exists():
                with commit_file(path) as draft:
                    draft.write_text(text)
    return path.read_text()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_full_is_said(path: Path) -> Iterator[None]:
    """UserError for a disk that is full while `path` is written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = "No space left" in str(error) or getattr(error, "errno", None) in _FULL
        if not full:
            raise
        raise UserError(
            f"{path}: the disk is full; free some space (or move run.folder) and run the same command again, "
            f"everything committed so far is kept"
        ) from None
