"""The specification: float64 logits in full, plain autograd, no tricks."""

import torch
import torch.distributed as dist


def unavailable_reason(device: torch.device) -> str | None:
    """The reference runs wherever torch has float64; None means available."""
    return None


def token_logprobs(hidden_TD, weight_VD, ids_TK, shard=None) -> torch.Tensor:
    logits_TV = hidden_TD.double() @ weight_VD.double().T
    if shard is None:
        return torch.log_softmax(logits_TV, dim=-1).gather(1, ids_TK)
    # what the other ranks hold is a constant here: gradients are this rank's part of the sum
    local_ids_TK, held_TK = shard.local_ids(ids_TK)
    logits_TV = logits_TV[:, : shard.stop - shard.start]
    target_TK = logits_TV.gather(1, local_ids_TK) * held_TK
    lse_T1 = logits_TV.logsumexp(-1, keepdim=True)
    lse_RT1, target_RTK = _from_all(lse_T1, shard.group), _from_all(target_TK, shard.group)
    return target_RTK.sum(0) - lse_RT1.logsumexp(0)


def token_loss(hidden_TD, weight_VD, target_ids_TK, target_weights_TK, token_weight_T, shard=None):
    logprobs_TK = token_logprobs(hidden_TD, weight_VD, target_ids_TK, shard)
    loss_T = -(target_weights_TK.double() * logprobs_TK).sum(1)
    return (token_weight_T.double() * loss_T).sum(), loss_T.detach()


def _from_all(mine: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[ranks, ...], differentiable in this rank's own slice."""
    if group is None:  # for torch that would be all ranks there are
        return mine[None]
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine.detach().contiguous(), group=group)
    parts[dist.get_rank(group)] = mine
    return torch.stack(parts)
