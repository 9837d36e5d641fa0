"""Records to Arrow tables and back. Ragged columns stay NumPy arrays on both sides."""

import itertools
from dataclasses import fields

import numpy as np
import pyarrow as pa

from npd_ascend.records import Decision, Reward, Rollout, Score

_FLOATS = pa.list_(pa.float32())
RECORDS = {"rollouts": Rollout, "scores": Score, "decisions": Decision, "rewards": Reward}
_TYPES = {
    "token_ids": pa.list_(pa.int32()),
    "logprobs": _FLOATS,
    "teacher_logprob": _FLOATS,
    "weight_version": pa.int32(),
    "prompt_len": pa.int32(),
    "heldout": pa.bool_(),
    "kept": pa.bool_(),
    "sample_id": pa.string(),
    "prompt_id": pa.string(),
    "finish_reason": pa.string(),
    "reason": pa.string(),
    "why": pa.string(),
}
_TOPK = ("teacher_topk_ids", "teacher_topk_logprobs")  # list<fixed_size_list<K>>; every other column is a double


def to_table(kind: str, records: list) -> pa.Table:
    """A table with one row per record; `records` may be empty."""
    columns = {}
    for field in fields(RECORDS[kind]):
        values = [getattr(record, field.name) for record in records]
        if field.name in _TOPK:
            columns[field.name] = _topk_column(values, np.int32 if field.name == _TOPK[0] else np.float32)
        else:
            columns[field.name] = pa.array(values, _TYPES.get(field.name, pa.float64()))
    return pa.table(columns)


def from_table(kind: str, table: pa.Table) -> list:
    """Records of every row; each checks itself."""
    columns: dict[str, list] = {}
    for field in fields(RECORDS[kind]):
        column = table[field.name].combine_chunks()
        if field.name in _TOPK:
            width = column.type.value_type.list_size
            columns[field.name] = _ragged(column, column.values.values.to_numpy().reshape(-1, width))
        elif field.name == "token_ids":
            columns[field.name] = [tuple(row.tolist()) for row in _ragged(column, column.values.to_numpy())]
        elif pa.types.is_list(column.type):
            columns[field.name] = _ragged(column, column.values.to_numpy())
        else:
            columns[field.name] = column.to_pylist()
    return [RECORDS[kind](**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def _topk_column(values: list[np.ndarray], dtype) -> pa.Array:
    width = values[0].shape[1] if values else 1
    flat = np.concatenate([v.reshape(-1) for v in values]) if values else np.empty(0)
    offsets = np.cumsum([0, *(len(v) for v in values)]).astype(np.int32)
    inner = pa.FixedSizeListArray.from_arrays(pa.array(flat.astype(dtype)), width)
    return pa.ListArray.from_arrays(pa.array(offsets), inner)


def _ragged(column: pa.ListArray, values: np.ndarray) -> list[np.ndarray]:
    offsets = column.offsets.to_numpy()
    return [values[start:end] for start, end in itertools.pairwise(offsets)]
