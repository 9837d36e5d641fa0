"""The specification: both logits in full and in float64, plain autograd, the definition word by word."""

import math

import torch
import torch.distributed as dist


def unavailable_reason(device: torch.device) -> str | None:
    """The reference runs wherever torch has float64; None means available."""
    return None


def dense_divergence(hidden_TD, weight_VD, teacher_hidden_TE, teacher_weight_VE, token_weight_T, beta, shard):
    student_TV = _whole(hidden_TD.double() @ weight_VD[: shard.rows].double().T, shard.group).log_softmax(-1)
    teacher_TV = _whole(teacher_hidden_TE.double() @ teacher_weight_VE[: shard.rows].double().T, shard.group)
    teacher_TV = teacher_TV.log_softmax(-1)
    if beta == 0:
        loss_T = _kl(teacher_TV, student_TV)
    elif beta == 1:
        loss_T = _kl(student_TV, teacher_TV)
    else:
        mixture_TV = torch.logaddexp(teacher_TV + math.log(beta), student_TV + math.log(1 - beta))
        loss_T = beta * _kl(teacher_TV, mixture_TV) + (1 - beta) * _kl(student_TV, mixture_TV)
    return (token_weight_T.double() * loss_T).sum(), loss_T.detach()


def _kl(p_TV, q_TV):
    """KL(p || q) of log-probabilities, per row."""
    return (p_TV.exp() * (p_TV - q_TV)).sum(-1)


def _whole(mine_TU: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Logits over the whole vocabulary, differentiable in this rank's own columns."""
    if group is None:
        return mine_TU
    width = torch.tensor([mine_TU.shape[1]], device=mine_TU.device)
    widths = [torch.empty_like(width) for _ in range(dist.get_world_size(group))]
    dist.all_gather(widths, width, group=group)
    padded = max(map(int, widths))
    sent = torch.nn.functional.pad(mine_TU.detach(), (0, padded - mine_TU.shape[1])).contiguous()
    parts = [torch.empty_like(sent) for _ in widths]
    dist.all_gather(parts, sent, group=group)
    parts = [part[:, : int(width)] for part, width in zip(parts, widths, strict=True)]
    parts[dist.get_rank(group)] = mine_TU
    return torch.cat(parts, 1)
