"""The specification: float64 logits in full, plain autograd, no tricks."""

import torch


def unavailable_reason(device: torch.device) -> str | None:
    """The reference runs wherever torch has float64; None means available."""
    return None


def token_logprobs(hidden_TD, weight_VD, ids_TK) -> torch.Tensor:
    logits_TV = hidden_TD.double() @ weight_VD.double().T
    return torch.log_softmax(logits_TV, dim=-1).gather(1, ids_TK)


def token_loss(hidden_TD, weight_VD, target_ids_TK, target_weights_TK, token_weight_T):
    logprobs_TK = token_logprobs(hidden_TD, weight_VD, target_ids_TK)
    loss_T = -(target_weights_TK.double() * logprobs_TK).sum(1)
    return (token_weight_T.double() * loss_T).sum(), loss_T.detach()
