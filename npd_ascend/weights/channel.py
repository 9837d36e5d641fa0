"""What a weight channel promises: a version is there whole or not at all."""

from pathlib import Path
from typing import Protocol

from npd_ascend.model.decoder import Decoder


class WeightChannel(Protocol):
    def publish(self, version: int, model: Decoder, source: Path) -> None:
        """Make `version` visible. `source`: the model folder whose config and tokenizer belong to it."""

    def fetch(self, version: int) -> Path:
        """A Hugging Face folder with the weights of `version`, its checksum compared."""

    def versions(self) -> list[int]:
        """Visible versions, rising."""
