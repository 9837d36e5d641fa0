"""What a weight channel promises: a version is there whole or not at all."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from npd_ascend.weights.canary import Probe

if TYPE_CHECKING:
    from npd_ascend.model.decoder import Decoder
    from npd_ascend.parallel.mesh import Mesh


class WeightChannel(Protocol):
    folder: Path  # RUN/weights or RUN/grpo/weights, where a sender says where it is too

    def publish(
        self, version: int, model: "Decoder", source: Path, probes: Sequence[Probe], mesh: "Mesh", *, step: int = 0
    ) -> None:
        """Make `version` visible; called by all ranks.

        source: the folder config and tokenizer are from. probes: what the trainer says of fixed tokens, see canary.py.
        step: steps of NPD that are in the weights.
        """

    def fetch(self, version: int) -> Path:
        """A Hugging Face folder with the weights of `version`, its checksum compared."""

    def path(self, version: int) -> Path:
        """Where `version` lies or would lie; nothing is compared."""

    def versions(self) -> list[int]:
        """Visible versions, rising."""

    def newest(self) -> tuple[int, int]:
        """(version, its step); (0, 0) before anything was published."""

    def drop_between(self, first: int, last: int) -> None:
        """Forget the versions [first, last)."""
