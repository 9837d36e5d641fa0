"""The durable hand-over between processes: Parquet shards and a manifest."""

from npd_ascend.stream.stream import Entry, Stream, read_table

__all__ = ["Entry", "Stream", "read_table"]
