"""RUN/checkpoints/<stage>/step-<N>: optimizer and cursor, whole or not at all, checksummed."""

import json
import logging
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from npd_ascend.durable import commit_folder, sha256

KEEP = 2  # the newest may turn out damaged
_log = logging.getLogger(__name__)


def save_checkpoint(folder: Path, step: int, tensors: dict[str, torch.Tensor], cursor: dict[str, int]) -> None:
    """Commit step-<N> in `folder` and drop all but the newest KEEP. `cursor`: where to go on."""
    with commit_folder(folder / f"step-{step:08d}") as draft:
        save_file({name: value.contiguous() for name, value in tensors.items()}, draft / "state.safetensors")
        stamp = {"cursor": cursor, "sha256": sha256(draft / "state.safetensors")}
        (draft / "cursor.json").write_text(json.dumps(stamp) + "\n")
    for old in sorted(folder.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, int]] | None:
    """(tensors, cursor) of the newest checkpoint that is intact, None if there is none.

    A damaged one is named in the log and set aside, and the one before it is used.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            stamp = json.loads((path / "cursor.json").read_text())
            intact = sha256(path / "state.safetensors") == stamp["sha256"]
        except (OSError, json.JSONDecodeError, KeyError):
            intact = False
        if intact:
            return load_file(path / "state.safetensors"), stamp["cursor"]
        _log.warning("%s: damaged (checksum differs); going back to the checkpoint before it", path)
        shutil.rmtree(path.with_name(f"damaged-{path.name}"), ignore_errors=True)
        path.rename(path.with_name(f"damaged-{path.name}"))
    return None
