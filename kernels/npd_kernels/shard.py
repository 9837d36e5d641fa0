"""One rank's rows of a vocabulary-parallel head."""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class VocabShard:
    """weight_VD[: rows] are rows start to stop of the head; rows after them are padding and get no mass.

    group: the ranks that hold the other rows; None: there are none.
    """

    start: int
    stop: int
    group: dist.ProcessGroup | None

    @property
    def rows(self) -> int:
        """How many stand for tokens here."""
        return self.stop - self.start

    def local_ids(self, ids_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows of weight_VD, whether the id is held here); where it is not, row 0 stands in."""
        held_TK = (ids_TK >= self.start) & (ids_TK < self.stop)
        return (ids_TK - self.start).masked_fill(~held_TK, 0), held_TK

    def combine(self, lse_C1: torch.Tensor, target_CK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Over all ranks: log-sum-exp of their log-sum-exps, sum of the target logits that one of them holds.

        One all-gather of 1 + K numbers per token and rank is all that crosses the group. Every rank adds in the same
        order, so all of them get the same bits.
        """
        parts_RCK = self._gather(torch.cat([lse_C1, target_CK], 1))
        return parts_RCK[..., :1].logsumexp(0), parts_RCK[..., 1:].sum(0)

    def logsumexp(self, top: torch.Tensor, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of values whose log-sum-exp here is top + rest, top the largest: the same two over all ranks.

        Apart, because (z - top) - rest keeps the digits that z - (top + rest) rounds away.
        """
        tops_R, rests_R = self._gather(torch.stack([top, rest])).unbind(1)
        top = tops_R.amax(0)
        return top, (tops_R - top + rests_R).logsumexp(0)

    def first_largest(self, value_T: torch.Tensor, id_T: torch.Tensor) -> torch.Tensor:
        """The id whose value is the largest over all ranks, element by element; of equal values the lowest rank's.

        Every rank chooses among the same numbers, so all of them choose alike.
        """
        rank_1T = self._gather(value_T).argmax(0, keepdim=True)
        return self._gather(id_T).gather(0, rank_1T)[0]

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Element by element over all ranks, the same bits on each."""
        return self._gather(x).sum(0)

    def _gather(self, mine: torch.Tensor) -> torch.Tensor:
        """[ranks, *mine.shape]"""
        if self.group is None:
            return mine[None]
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, mine.contiguous(), group=self.group)
        return torch.stack(parts)
