"""Weight versions as Hugging Face folders RUN/weights/v<N>; the rename of the folder is the commit point."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from npd_ascend.durable import sha256
from npd_ascend.errors import UserError
from npd_ascend.weights.canary import Probe

if TYPE_CHECKING:
    from npd_ascend.model.decoder import Decoder
    from npd_ascend.parallel.mesh import Mesh


_VERSION = re.compile(r"v(\d+)")


class DiskChannel:
    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def publish(
        self,
        version: int,
        model: "Decoder",
        source: Path,
        probes: Sequence[Probe],
        mesh: "Mesh | None" = None,
        *,
        step: int = 0,
    ) -> None:
        """Write v<version>, float32 or bfloat16 as the model is. A version is never written twice. mesh None: alone."""
        # who only reads versions, as `npd run` does, waits for no torch
        from npd_ascend.parallel.mesh import ALONE
        from npd_ascend.weights.export import export

        mesh = mesh or ALONE
        if mesh.rank == 0 and version in self.versions():  # another rank may ask when rank 0 is done
            raise AssertionError(f"version {version} is already published in {self.folder}")
        stamp = {"version": version, "step": step}
        export(self.folder / f"v{version}", model, source, mesh, stamp=stamp, probes=probes)

    def fetch(self, version: int) -> Path:
        """UserError if the version is not there or its weights differ from their checksum."""
        folder = self.path(version)
        if not (folder / "version.json").exists():
            raise UserError(
                f"{folder}: weight version {version} is not published; there are {self.versions()}, and "
                f"`npd sft`, `npd distill` or `npd grpo` makes the next"
            )
        stamp = json.loads((folder / "version.json").read_text())
        if sha256(folder / "model.safetensors") != stamp["sha256"]:
            raise UserError(
                f"{folder}/model.safetensors: differs from its checksum; restore it from a copy. "
                f"If no later version was trained, delete {folder} and run the same command again to make it anew"
            )
        return folder

    def path(self, version: int) -> Path:
        return self.folder / f"v{version}"

    def versions(self) -> list[int]:
        found = (_VERSION.fullmatch(path.name) for path in self.folder.glob("v*"))  # not what somebody put beside them
        return sorted(int(name[1]) for name in found if name)

    def newest(self) -> tuple[int, int]:
        version = max(self.versions(), default=0)
        path = self.folder / f"v{version}" / "version.json"
        return version, json.loads(path.read_text())["step"] if path.exists() else 0

    def drop_between(self, first: int, last: int) -> None:
        for version in self.versions():
            if first <= version < last:
                shutil.rmtree(self.folder / f"v{version}")
