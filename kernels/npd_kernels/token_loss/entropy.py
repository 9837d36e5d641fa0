"""How spread out the distribution at every token is: one product and two sums, in plain torch on every device."""

import torch

from npd_kernels.shard import VocabShard
from npd_kernels.streaming import chunks


@torch.no_grad()
def entropies(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, *, shard: VocabShard | None = None) -> torch.Tensor:
    """-sum_V p log p in nats, p = softmax(hidden @ weight^T); float32 [T].

    hidden_TD, weight_VD: one dtype. shard: as for token_loss; all ranks get the same bits.
    """
    whole = shard or VocabShard(0, len(weight_VD), None)
    entropy_T = torch.empty(len(hidden_TD), dtype=torch.float32, device=hidden_TD.device)
    for tokens, logits_CV in chunks(hidden_TD, weight_VD):
        z_CV = logits_CV[:, : whole.rows].float()
        lse_C1 = whole.combine(z_CV.logsumexp(1, keepdim=True), z_CV[:, :0])[0]
        logprobs_CV = z_CV - lse_C1
        # the sum of p log p itself: lse - sum p z would be a small difference of large numbers
        entropy_T[tokens] = -whole.sum((logprobs_CV.exp() * logprobs_CV).sum(1))
    return entropy_T
