"""Rows of jsonl, Parquet and Arrow files, alone or in folders as Hugging Face data sets come.

A row has a text under prompt_key, or one turn of chat: a list of {"role", "content"} with one message of the user and
at most one of the assistant behind it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from npd_ascend.errors import UserError

_SUFFIXES = (".jsonl", ".parquet", ".arrow")


class SourceConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path  # a file, or a folder in which every file of the known kinds is read
    prompt_key: str = "prompt"
    answer_key: str | None = None  # none: rows without answers, or with them in the chat under prompt_key


@dataclass(frozen=True, slots=True)
class Row:
    place: str  # FILE:NUMBER, from 1
    prompt: str | None  # None: no text, or a chat of several turns
    answer: str | None


def files_of(source: SourceConfig, *, all_splits: bool = False) -> list[Path]:
    """In the order in which they are read; UserError if there is none.

    all_splits: of what `datasets` has saved; else several are refused, since one may be for evaluation.
    """
    path = source.path
    found = _files_in(path, all_splits) if path.is_dir() else [path]
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not found or found[0].suffix not in _SUFFIXES:
        raise UserError(f"{path}: want files that end in {', '.join(_SUFFIXES)}")
    return found


def _files_in(folder: Path, all_splits: bool) -> list[Path]:
    """Of what `datasets` has saved to disk the files that its state.json names, as it keeps caches beside them.

    UserError for a copy that is not whole.
    """
    for saved in [] if all_splits else folder.rglob("dataset_dict.json"):
        splits = _saved_by_datasets(saved, "splits")
        if len(splits) > 1:
            raise UserError(
                f"{saved.parent}: holds the splits {', '.join(splits)}; name one of them, as {saved.parent / splits[0]}"
            )
    found = {file for file in folder.rglob("*") if file.suffix in _SUFFIXES}
    for state in folder.rglob("state.json"):
        named = {state.parent / file["filename"] for file in _saved_by_datasets(state, "_data_files")}
        if missing := sorted(named - found):
            raise UserError(f"{state}: names {missing[0].name}, which is not there; copy the folder again")
        if named:
            found = {file for file in found if file.parent != state.parent or file in named}
    return sorted(found)


def _saved_by_datasets(file: Path, key: str) -> list:
    """What stands under `key`; nothing in a file of that name from elsewhere."""
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); copy the folder again") from None
    return saved.get(key, []) if isinstance(saved, dict) else []


def count_rows(file: Path) -> int:
    """Without reading them where the format allows it; blank lines of jsonl count."""
    if file.suffix == ".parquet":
        return _parquet(file).metadata.num_rows
    if file.suffix == ".arrow":
        return sum(batch.num_rows for batch in _arrow_batches(file))
    with file.open("rb") as lines:
        return sum(1 for _ in lines)


def read_rows(source: SourceConfig, file: Path) -> Iterator[Row]:
    """UserError for a file that is not what its name says, and for a missing column."""
    read = _jsonl if file.suffix == ".jsonl" else _table
    for number, record in read(file, source):
        prompt, answer = _turn(record.get(source.prompt_key))
        if source.answer_key is not None:
            given = record.get(source.answer_key)
            is_number = isinstance(given, int | float) and not isinstance(given, bool)
            answer = str(given) if is_number else given if isinstance(given, str) else None
        yield Row(f"{file}:{number}", prompt, answer)


def _turn(value: Any) -> tuple[str | None, str | None]:
    """(prompt, answer) of a text or of one turn of chat."""
    if isinstance(value, str):
        return (value if value.strip() else None), None
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return None, None
    roles = [message.get("role") for message in value]
    texts = [message.get("content") for message in value]
    if roles not in (["user"], ["user", "assistant"]) or not all(isinstance(text, str) and text for text in texts):
        return None, None
    return texts[0], texts[1] if len(texts) > 1 else None


def _jsonl(file: Path, source: SourceConfig) -> Iterator[tuple[int, dict]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{file}:{number}: not JSON ({error})") from None
            if not isinstance(record, dict) or source.prompt_key not in record:
                raise UserError(f"{file}:{number}: no key {source.prompt_key!r}; set prompt_key")
            yield number, record


def _table(file: Path, source: SourceConfig) -> Iterator[tuple[int, dict]]:
    columns = [key for key in (source.prompt_key, source.answer_key) if key is not None]
    number = 0
    for batch in _arrow_batches(file) if file.suffix == ".arrow" else _parquet_batches(file, columns):
        if missing := [key for key in columns if key not in batch.schema.names]:
            raise UserError(f"{file}: no column {missing[0]!r}; it has {', '.join(batch.schema.names)}")
        for record in batch.select(columns).to_pylist():
            number += 1
            yield number, record


def _parquet(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise UserError(f"{file}: not a Parquet file ({error})") from None


def _parquet_batches(file: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    table = _parquet(file)
    known = [key for key in columns if key in table.schema_arrow.names]
    yield from table.iter_batches(columns=known if known == columns else None)


def _arrow_batches(file: Path) -> Iterator[pa.RecordBatch]:
    """As `datasets` saves them: the streaming format of Arrow."""
    try:
        with pa.memory_map(str(file)) as mapped:
            yield from pa.ipc.open_stream(mapped)
    except pa.ArrowInvalid as error:
        raise UserError(f"{file}: not an Arrow stream ({error})") from None
