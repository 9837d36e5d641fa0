"""One rank's rows of a vocabulary-parallel head."""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class VocabShard:
    """weight_VD[: stop - start] are rows start to stop of the head; rows after them are padding and get no mass."""

    start: int
    stop: int
    group: dist.ProcessGroup

    def local_ids(self, ids_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows of weight_VD, whether the id is held here); where it is not, row 0 stands in."""
        held_TK = (ids_TK >= self.start) & (ids_TK < self.stop)
        return (ids_TK - self.start).masked_fill(~held_TK, 0), held_TK
