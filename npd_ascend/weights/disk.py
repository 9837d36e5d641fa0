"""Weight versions as Hugging Face folders RUN/weights/v<N>; the rename of the folder is the commit point."""

import json
from pathlib import Path

from npd_ascend.durable import commit_folder, sha256
from npd_ascend.errors import UserError
from npd_ascend.model.decoder import Decoder
from npd_ascend.model.load import save_decoder


class DiskChannel:
    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def publish(self, version: int, model: Decoder, source: Path) -> None:
        """Write v<version>, float32 or bfloat16 as the model is. A version is never written twice."""
        if version in self.versions():
            raise AssertionError(f"version {version} is already published in {self.folder}")
        with commit_folder(self.folder / f"v{version}") as draft:
            save_decoder(model, source, draft)
            stamp = {"version": version, "sha256": sha256(draft / "model.safetensors")}
            (draft / "version.json").write_text(json.dumps(stamp) + "\n")

    def fetch(self, version: int) -> Path:
        """UserError if the version is not there or its weights differ from their checksum."""
        folder = self.folder / f"v{version}"
        if not (folder / "version.json").exists():
            raise UserError(f"{folder}: weight version {version} is not published; there are {self.versions()}")
        stamp = json.loads((folder / "version.json").read_text())
        if sha256(folder / "model.safetensors") != stamp["sha256"]:
            raise UserError(f"{folder}/model.safetensors: differs from its checksum; delete {folder} and train again")
        return folder

    def versions(self) -> list[int]:
        return sorted(int(path.name[1:]) for path in self.folder.glob("v*"))
