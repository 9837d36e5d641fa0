"""RUN/checkpoints/<stage>/step-<N>: optimizer and cursor, whole or not at all, checksummed, for any layout of ranks.

Every rank writes its rectangles of the state (torch.distributed.checkpoint, safetensors files) from a copy, while
training goes on; a rank of another layout later reads the rectangles that it needs. The rename of the folder by
rank 0 is the commit point.
"""

import json
import logging
import shutil
import warnings
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint import planner as dcp_planner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from npd_ascend.durable import commit_folder, sha256
from npd_ascend.parallel.mesh import ALONE, Mesh

# said on every save and load of a single process, which is what no_dist asks for
warnings.filterwarnings("ignore", message="torch.distributed is disabled")
KEEP = 2  # the newest may turn out damaged
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A part of a named global tensor, and this rank's values of it."""

    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]  # of the whole
    values: torch.Tensor


class Checkpoints:
    """Those of one stage. One is written at a time; `wait` before the process ends."""

    def __init__(self, folder: Path, mesh: Mesh = ALONE):
        self.folder, self._mesh = folder, replace(mesh, host_group=mesh.checkpoint_group)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future | None = None

    def save(self, cursor: dict[str, int], rectangles: Iterable[Rectangle]) -> None:
        """Copy the state and write step-<cursor["step"]> in the background; all but the newest KEEP are dropped.

        Raises what went wrong with the one before.
        """
        self.wait()
        self._writing = self._thread.submit(self._write, cursor, _merged_copies(rectangles))

    def wait(self) -> None:
        """Return when nothing is being written any more; raises what went wrong with it."""
        if self._writing:
            writing, self._writing = self._writing, None
            writing.result()

    def load(self, rectangles: Iterable[Rectangle]) -> dict[str, int] | None:
        """Fill the rectangles from the newest checkpoint that is intact; its cursor, None if there is none.

        A damaged one is named in the log and set aside, and the one before it is used.
        """
        found = self._mesh.from_first(self._newest_intact() if self._mesh.rank == 0 else None)
        if found is None:
            return None
        path, cursor = found
        views = list(rectangles)
        wanted = {chunk.name: chunk for chunk in _bounding(views)}
        dcp.load(
            wanted,
            storage_reader=dcp.HuggingFaceStorageReader(str(path)),
            planner=_LoadPlanner(),
            process_group=self._mesh.host_group,
            no_dist=self._mesh.host_group is None,
        )
        for view in views:
            whole = wanted[view.name]
            index = (
                slice(at - start, at - start + n)
                for at, start, n in zip(view.offsets, whole.offsets, view.values.shape, strict=True)
            )
            view.values.copy_(whole.values[tuple(index)])
        return cursor

    def _write(self, cursor: dict[str, int], chunks: list[Rectangle]) -> None:
        path = self.folder / f"step-{cursor['step']:08d}"
        first = self._mesh.rank == 0
        with commit_folder(path) if first else nullcontext(self._mesh_draft(path)) as draft:
            self._mesh.barrier()  # the draft is there
            writer = dcp.HuggingFaceStorageWriter(str(draft), save_distributed=True)
            # all is on the CPU by now; to copy ahead it would ask for a stream of the accelerator, which in this thread
            # is the first card for every rank, and open it
            writer.per_thread_copy_ahead = 0
            try:
                dcp.save(
                    {chunk.name: chunk for chunk in chunks},
                    storage_writer=writer,
                    planner=_SavePlanner(),
                    process_group=self._mesh.host_group,
                    no_dist=self._mesh.host_group is None,
                )
            except CheckpointException as error:
                raise next(iter(error.failures.values()))[0] from None
            if first:
                sums = {file.name: sha256(file) for file in sorted(draft.glob("*.safetensors"))}
                (draft / "cursor.json").write_text(json.dumps({"cursor": cursor, "sha256": sums}) + "\n")
        if first:
            for old in sorted(self.folder.glob("step-*"))[:-KEEP]:
                shutil.rmtree(old)
        self._mesh.barrier()

    @staticmethod
    def _mesh_draft(path: Path) -> Path:
        return path.with_name(f".{path.name}.draft")

    def _newest_intact(self) -> tuple[Path, dict[str, int]] | None:
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                stamp = json.loads((path / "cursor.json").read_text())
                intact = bool(stamp["sha256"]) and all(
                    sha256(path / name) == wanted for name, wanted in stamp["sha256"].items()
                )
            except (OSError, json.JSONDecodeError, KeyError):
                intact = False
            if intact:
                return path, stamp["cursor"]
            _log.warning("%s: damaged (checksum differs); going back to the checkpoint before it", path)
            shutil.rmtree(path.with_name(f"damaged-{path.name}"), ignore_errors=True)
            path.rename(path.with_name(f"damaged-{path.name}"))
        return None


def _by_name(rectangles: Iterable[Rectangle]) -> Iterable[tuple[str, list[Rectangle]]]:
    ordered = sorted(rectangles, key=lambda r: (r.name, r.offsets))
    for name, group in groupby(ordered, key=lambda r: r.name):
        yield name, list(group)


def _merged_copies(rectangles: Iterable[Rectangle]) -> list[Rectangle]:
    """One rectangle per name, on the CPU; a rank's rows of one tensor are neighbours in it."""
    merged = []
    for name, parts in _by_name(rectangles):
        merged.append(
            Rectangle(name, parts[0].offsets, parts[0].shape, torch.cat([part.values.cpu() for part in parts]))
        )
        if any(b.offsets[0] != a.offsets[0] + len(a.values) for a, b in pairwise(parts)):
            raise AssertionError(f"{name}: the rows of this rank are not neighbours")
    return merged


def _bounding(rectangles: Iterable[Rectangle]) -> Iterable[Rectangle]:
    """Per name one empty rectangle on the CPU that holds all of them."""
    for name, parts in _by_name(rectangles):
        first = parts[0]
        rows = max(part.offsets[0] + len(part.values) for part in parts) - first.offsets[0]
        yield Rectangle(name, first.offsets, first.shape, torch.empty(rows, *first.values.shape[1:]))


def _chunk(rectangle: Rectangle) -> dcp_metadata.ChunkStorageMetadata:
    return dcp_metadata.ChunkStorageMetadata(torch.Size(rectangle.offsets), rectangle.values.size())


class _SavePlanner(dcp.DefaultSavePlanner):
    """torch.distributed.checkpoint knows its own sharded tensors; these are ours."""

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> dcp_planner.SavePlan:
        self.plan = dcp_planner.SavePlan([self._item(chunk) for chunk in self.state_dict.values()])
        return self.plan

    def _item(self, rectangle: Rectangle) -> dcp_planner.WriteItem:
        chunk = _chunk(rectangle)
        properties = dcp_metadata.TensorProperties.create_from_tensor(rectangle.values)
        data = dcp_planner.TensorWriteData(chunk, properties, torch.Size(rectangle.shape))
        index = dcp_metadata.MetadataIndex(rectangle.name, chunk.offsets)
        return dcp_planner.WriteItem(index, dcp_planner.WriteItemType.SHARD, tensor_data=data)

    def lookup_object(self, index: dcp_metadata.MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].values


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> dcp_planner.LoadPlan:
        stored: dict[str, Any] = dict(self.metadata.state_dict_metadata)
        return dcp_planner.LoadPlan(
            [
                item
                for rectangle in self.state_dict.values()
                for item in create_read_items_for_chunk_list(
                    rectangle.name, stored[rectangle.name], [_chunk(rectangle)]
                )
            ]
        )

    def lookup_tensor(self, index: dcp_metadata.MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].values
