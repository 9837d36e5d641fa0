"""What a weight channel promises: a version is there whole or not at all."""

from pathlib import Path
from typing import Protocol

from npd_ascend.model.decoder import Decoder
from npd_ascend.parallel.mesh import Mesh


class WeightChannel(Protocol):
    def publish(self, version: int, model: Decoder, source: Path, mesh: Mesh) -> None:
        """Make `version` visible; called by all ranks. `source`: the folder config and tokenizer are from."""

    def fetch(self, version: int) -> Path:
        """A Hugging Face folder with the weights of `version`, its checksum compared."""

    def versions(self) -> list[int]:
        """Visible versions, rising."""
