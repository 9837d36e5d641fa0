"""Samples into packs of at most `pack_tokens` tokens.

Every sample stands in exactly one pack, whole. Best fit decreasing decides how many packs there are
(longest first, each into the fullest pack that still takes it; within 11/9 of the optimum plus one
pack, Johnson 1973). Left at that, the first packs would hold only the longest samples and a step
would see one length; so the samples are then dealt, longest first, each to the emptiest of that many
packs or, if that leaves too little slack, of 2% more, which gives every pack the same mix and nearly the
same cost. Where dealing does not fit (samples nearly as long as a pack) the best-fit packs stand.

Ties are broken by sample id, so packs are a function of the set of samples alone. Inside a pack
samples stay longest first: neighbours of equal length share one attention call.
"""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from itertools import chain, pairwise

import numpy as np
import torch

from npd_ascend.device import to_device
from npd_ascend.errors import UserError


def pack_samples(lengths: Mapping[str, int], pack_tokens: int) -> list[list[str]]:
    """Packs of sample ids. `lengths`: tokens of each sample. UserError if one is longer than a pack."""
    order = sorted(lengths, key=lambda sample_id: (-lengths[sample_id], sample_id))
    if order and lengths[order[0]] > pack_tokens:
        raise UserError(
            f"sample {order[0]} has {lengths[order[0]]} tokens but pack_tokens is {pack_tokens}; raise pack_tokens, "
            f"or let filters.max_tokens drop such samples by name"
        )
    packs = _best_fit(order, lengths, pack_tokens)
    for num_packs in (len(packs), len(packs) + max(1, len(packs) // 50)):
        dealt = _deal(order, lengths, pack_tokens, num_packs)
        if dealt is not None:
            return dealt
    return packs


def _best_fit(order: Sequence[str], lengths: Mapping[str, int], pack_tokens: int) -> list[list[str]]:
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    packs: list[list[str]] = []
    for sample_id in order:
        at = bisect_left(room, (lengths[sample_id], -1))
        if at == len(room):
            packs.append([])
            free, pack = pack_tokens, len(packs) - 1
        else:
            free, pack = room.pop(at)
        packs[pack].append(sample_id)
        insort(room, (free - lengths[sample_id], pack))
    return packs


def _deal(order: Sequence[str], lengths: Mapping[str, int], pack_tokens: int, num_packs: int) -> list[list[str]] | None:
    """`num_packs` packs of nearly equal size, None if that does not fit."""
    packs: list[list[str]] = [[] for _ in range(num_packs)]
    fullness = [(0, pack) for pack in range(num_packs)]  # a heap
    for sample_id in order:
        used, pack = fullness[0]
        if used + lengths[sample_id] > pack_tokens:
            return None
        packs[pack].append(sample_id)
        heapreplace(fullness, (used + lengths[sample_id], pack))
    return packs


def share_packs(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Which packs each rank trains on in one step: longest first, each to the rank with the least to do.

    costs: of each pack, in any unit. A rank may get none. Ties go to the lower rank, packs keep their order.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [(0.0, rank) for rank in range(ranks)]  # a heap
    for pack in sorted(range(len(costs)), key=lambda pack: (-costs[pack], pack)):
        used, rank = load[0]
        shares[rank].append(pack)
        heapreplace(load, (used + costs[pack], rank))
    return [sorted(share) for share in shares]


def pack_fill(tokens: int, num_packs: int, pack_tokens: int) -> float:
    """Share of the packs' room that holds tokens, 0 to 1."""
    return tokens / (num_packs * pack_tokens)


@dataclass(frozen=True, slots=True)
class PackLayout:
    """A pack as tensors: T tokens, A answer tokens of all samples in order.

    The hidden state at predict_A[i] predicts answer_ids_A[i]; the last token of a sample predicts nothing,
    so nothing crosses a seam.
    """

    token_ids_T: torch.Tensor  # int64
    cu_seqlens: tuple[int, ...]
    predict_A: torch.Tensor  # int64, positions in the pack
    answer_ids_A: torch.Tensor  # int64
    answer_lens: tuple[int, ...]  # per sample


def lay_out(rows: Sequence[tuple[Sequence[int], int]], device: torch.device, multiple_of: int = 1) -> PackLayout:
    """Lay samples end to end. rows: (token ids, prompt length) of each sample, in pack order.

    multiple_of: what T must divide by (sequence parallelism); a last sample of padding without an answer sees to it.
    """
    cu_seqlens = [0]
    for ids, _ in rows:
        cu_seqlens.append(cu_seqlens[-1] + len(ids))
    predict = np.concatenate(
        [
            np.arange(start + prompt_len - 1, end - 1)
            for (start, end), (_, prompt_len) in zip(pairwise(cu_seqlens), rows, strict=True)
        ]
    )
    token_ids = np.fromiter(chain.from_iterable(ids for ids, _ in rows), np.int64, cu_seqlens[-1])
    if padding := -cu_seqlens[-1] % multiple_of:
        token_ids = np.pad(token_ids, (0, padding))
        cu_seqlens.append(len(token_ids))
    return PackLayout(
        token_ids_T=to_device(token_ids, device),
        cu_seqlens=tuple(cu_seqlens),
        predict_A=to_device(predict, device),
        answer_ids_A=to_device(token_ids[predict + 1], device),
        answer_lens=tuple(len(ids) - prompt_len for ids, prompt_len in rows),
    )
