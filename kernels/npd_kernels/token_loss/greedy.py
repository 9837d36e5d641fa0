"""What greedy decoding would take at every token: one product and a maximum, in plain torch on every device."""

import torch

from npd_kernels.shard import VocabShard
from npd_kernels.streaming import chunks


@torch.no_grad()
def greedy_ids(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, *, vocab_size: int, shard: VocabShard | None = None
) -> torch.Tensor:
    """The id below vocab_size with the largest logit; of equal ones the lowest, as torch.argmax has it. int64 [T].

    hidden_TD, weight_VD: one dtype; logits are compared in it. shard: as for token_loss; all ranks get the same ids.
    """
    start, stop = (shard.start, shard.stop) if shard else (0, len(weight_VD))
    value_T, id_T = hidden_TD.new_empty(len(hidden_TD)), torch.empty(len(hidden_TD), dtype=torch.int64)
    id_T = id_T.to(hidden_TD.device)
    for tokens, logits_CV in chunks(hidden_TD, weight_VD):
        logits_CV[:, max(0, min(stop, vocab_size) - start) :] = -torch.inf
        value_T[tokens], row_C = logits_CV.max(-1)
        id_T[tokens] = start + row_C
    return shard.first_largest(value_T, id_T) if shard else id_T
