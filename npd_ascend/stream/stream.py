"""RUN/stream: shards of rollouts, scores and decisions; a manifest line is what makes a shard exist.

A shard is written under a draft name, fsynced and renamed; then one line goes to manifest.jsonl. A
process killed at any instant leaves either no trace or a file without a line, which the next writer
of that shard replaces.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from npd_ascend.durable import append_line, commit_file, sha256
from npd_ascend.errors import UserError
from npd_ascend.stream.schema import from_table, to_table


@dataclass(frozen=True, slots=True)
class Entry:
    """One manifest line: shard `shard` of `kind` made with weights `version`."""

    kind: str  # rollouts, scores, decisions; rewards of GRPO
    version: int
    shard: int
    rows: int
    file: str
    sha256: str

    def line(self) -> str:
        """Without its newline."""
        return json.dumps(asdict(self))


class Stream:
    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.manifest = self.folder / "manifest.jsonl"
        self.tokenizer = self.folder / "tokenizer.txt"  # fingerprint of the tokenizer that the token ids are of
        self._entries: dict[tuple[str, int, int], Entry] = {}
        self._read_to = 0  # bytes of the manifest that _entries come from

    def commit(self, kind: str, version: int, shard: int, records: list) -> None:
        """Write `records` as one shard. The manifest line is the commit point."""
        path = self.folder / f"{kind}-v{version}-{shard:05d}.parquet"
        with commit_file(path) as draft:
            pq.write_table(to_table(kind, records), draft, compression="zstd")
        append_line(self.manifest, Entry(kind, version, shard, len(records), path.name, sha256(path)).line())

    def entries(self, kind: str, version: int) -> dict[int, Entry]:
        """Committed shards of one version by number."""
        return {entry.shard: entry for entry in self.every() if (entry.kind, entry.version) == (kind, version)}

    def shards(self, kind: str) -> dict[int, Entry]:
        """Committed shards of the schedule with npd.stream, where a number stands for one shard of any version."""
        return {entry.shard: entry for entry in self.every() if entry.kind == kind}

    def is_decided(self, version: int) -> bool:
        """Whether rollouts of `version` are there, all scored and decided on."""
        rollouts, scores, decisions = (self.entries(kind, version) for kind in ("rollouts", "scores", "decisions"))
        rows, decided = (sum(entry.rows for entry in entries.values()) for entries in (rollouts, decisions))
        return 0 < rows == decided and rollouts.keys() == scores.keys()

    def every(self) -> list[Entry]:
        """All committed shards; of a shard that was made again only the last. Asking again reads what is new."""
        if not self.manifest.exists():
            return []
        if self.manifest.stat().st_size < self._read_to:  # somebody removed a line
            self._entries, self._read_to = {}, 0
        with self.manifest.open("rb") as file:
            file.seek(self._read_to)
            new = file.read()
        # a last line without its newline is being written, or was torn by a kill and never committed
        new = new[: new.rfind(b"\n") + 1]
        try:
            entries = [Entry(**json.loads(line)) for line in new.splitlines()]
        except (json.JSONDecodeError, TypeError) as error:
            raise UserError(f"{self.manifest}: damaged ({error}); delete {self.folder} to make it again") from None
        self._entries |= {(entry.kind, entry.version, entry.shard): entry for entry in entries}
        self._read_to += len(new)
        return list(self._entries.values())

    def read_shard(self, entry: Entry) -> list:
        """Records of one shard, after its checksum was compared with the manifest's."""
        path = self.folder / entry.file
        if not path.exists() or sha256(path) != entry.sha256:
            state = "differs from the checksum in manifest.jsonl" if path.exists() else "is gone"
            raise UserError(
                f"{path}: {state}; remove its line from {self.manifest.name}, and the `npd run` of this folder makes "
                f"the shard anew"
            )
        return from_table(entry.kind, pq.read_table(path))

    def mark_done(self, steps: int) -> None:
        """`steps` were trained, and whether to publish after them is decided."""
        with commit_file(self.folder / "steps_done.json") as draft:
            draft.write_text(json.dumps({"steps": steps}) + "\n")

    def steps_done(self) -> int:
        """The newest mark; 0 before there is one."""
        path = self.folder / "steps_done.json"
        return json.loads(path.read_text())["steps"] if path.exists() else 0

    def read(self, kind: str, version: int) -> list:
        """Records of all committed shards, in shard order."""
        entries = self.entries(kind, version)
        return [record for shard in sorted(entries) for record in self.read_shard(entries[shard])]


def read_table(run: Path) -> pa.Table:
    """Everything in RUN/stream as one table, a row per rollout; what no later stage has made is null.

    For notebooks: rollouts joined with scores and decisions on sample_id; of RUN/grpo, with rewards.
    """
    stream = Stream(Path(run) / "stream")
    joined = _whole_table(stream, "rollouts")
    if joined is None:
        raise UserError(f"{run}/stream: no rollouts; run `npd rollout --run {run}` first")
    wanted = joined["sample_id"].to_pylist()
    for kind in ("scores", "decisions", "rewards"):
        table = _whole_table(stream, kind)
        if table is None:
            continue
        row_of = {sample_id: row for row, sample_id in enumerate(table["sample_id"].to_pylist())}
        aligned = table.take(pa.array([row_of.get(sample_id) for sample_id in wanted], pa.int64()))
        for name in table.column_names:
            if name not in joined.column_names:
                joined = joined.append_column(name, aligned[name])
    return joined


def _whole_table(stream: Stream, kind: str) -> pa.Table | None:
    entries = sorted((e for e in stream.every() if e.kind == kind), key=lambda e: (e.version, e.shard))
    # a shard without rows does not know the width of its top-k columns
    filled = [entry for entry in entries if entry.rows] or entries[:1]
    return pa.concat_tables([pq.read_table(stream.folder / entry.file) for entry in filled]) if filled else None
