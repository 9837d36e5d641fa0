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

    def combine(self, lse_C1: torch.Tensor, target_CK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Over all ranks: log-sum-exp of their log-sum-exps, sum of the target logits that one of them holds.

        One all-gather of 1 + K numbers per token and rank is all that crosses the group. Every rank adds in the same
        order, so all of them get the same bits.
        """
        mine = torch.cat([lse_C1, target_CK], 1)
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, mine, group=self.group)
        parts_RCK = torch.stack(parts)
        return parts_RCK[..., :1].logsumexp(0), parts_RCK[..., 1:].sum(0)
