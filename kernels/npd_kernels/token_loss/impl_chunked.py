"""Plain torch, a few hundred tokens at a time; the gradient is formed in the forward pass.

The logits of one chunk are turned into their own gradient in place and multiplied out at once, so
memory holds one chunk of [C, V] and never [T, V], and the head is multiplied three times per token
(logits, dHidden, dWeight) where recomputation would take four.
"""

import torch

# One chunk of float32 logits. Large enough for full GEMM speed, small enough to stay a rounding
# error beside the weights (benchmarks/train_step.py prints the peak).
CHUNK_BYTES = 32 * 2**20


def unavailable_reason(device: torch.device) -> str | None:
    """Runs on every device torch has; None means available."""
    return None


def chunk_tokens(vocab_size: int) -> int:
    """Rows of float32 logits that fit CHUNK_BYTES."""
    return max(1, CHUNK_BYTES // (4 * vocab_size))


def token_loss(hidden_TD, weight_VD, target_ids_TK, target_weights_TK, token_weight_T):
    return _TokenLoss.apply(hidden_TD, weight_VD, target_ids_TK, target_weights_TK, token_weight_T)


def token_logprobs(hidden_TD, weight_VD, ids_TK):
    return _TokenLogprobs.apply(hidden_TD, weight_VD, ids_TK)


def _softmax_and_lse(logits_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(z - max) in place of the logits, its row sum, and logsumexp."""
    max_C1 = logits_CV.amax(-1, keepdim=True)
    exp_CV = logits_CV.sub_(max_C1).exp_()
    sum_C1 = exp_CV.sum(-1, keepdim=True)
    return sum_C1, max_C1 + sum_C1.log()


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, ids_TK, weights_TK, token_weight_T):
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        num_tokens, dtype = hidden_TD.shape[0], hidden_TD.dtype
        loss_T = torch.empty(num_tokens, dtype=torch.float32, device=hidden_TD.device)
        d_hidden_TD = torch.empty_like(hidden_TD) if wants_hidden else None
        # bfloat16 would lose the small chunks of a long sum
        d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None

        for rows in torch.arange(num_tokens).split(chunk_tokens(weight_VD.shape[0])):
            rows = slice(int(rows[0]), int(rows[-1]) + 1)
            logits_CV = (hidden_TD[rows] @ weight_VD.T).float()
            target_CK = logits_CV.gather(1, ids_TK[rows])
            sum_C1, lse_C1 = _softmax_and_lse(logits_CV)
            loss_T[rows] = (weights_TK[rows] * (lse_C1 - target_CK)).sum(1)
            if not (wants_hidden or wants_weight):
                continue
            scaled_CK = weights_TK[rows] * token_weight_T[rows, None]
            logits_CV.mul_(scaled_CK.sum(1, keepdim=True) / sum_C1).scatter_add_(1, ids_TK[rows], -scaled_CK)
            d_logits_CV = logits_CV.to(dtype)
            if wants_hidden:
                torch.mm(d_logits_CV, weight_VD, out=d_hidden_TD[rows])
            if wants_weight and dtype == torch.float32:
                d_weight_VD.addmm_(d_logits_CV.T, hidden_TD[rows])
            elif wants_weight:
                d_weight_VD += d_logits_CV.T @ hidden_TD[rows]

        ctx.gradients = (d_hidden_TD, d_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(loss_T)
        return (token_weight_T * loss_T).sum(), loss_T

    @staticmethod
    def backward(ctx, d_loss_sum, _):
        """Scales in place: a second copy of [V, D] would double the peak, so one backward is all there is."""
        if ctx.gradients is None:
            raise RuntimeError("token_loss: backward was already called; its gradients were given away")
        (d_hidden_TD, d_weight_VD), ctx.gradients = ctx.gradients, None
        if d_hidden_TD is not None:
            d_hidden_TD.mul_(d_loss_sum)
        if d_weight_VD is not None:
            d_weight_VD = d_weight_VD.mul_(d_loss_sum).to(ctx.weight_dtype)
        return d_hidden_TD, d_weight_VD, None, None, None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, ids_TK):
        logprobs_TK = torch.empty(ids_TK.shape, dtype=torch.float32, device=hidden_TD.device)
        size = chunk_tokens(weight_VD.shape[0])
        for hidden_CD, ids_CK, out_CK in zip(
            hidden_TD.split(size), ids_TK.split(size), logprobs_TK.split(size), strict=True
        ):
            logits_CV = (hidden_CD @ weight_VD.T).float()
            target_CK = logits_CV.gather(1, ids_CK)
            out_CK.copy_(target_CK - _softmax_and_lse(logits_CV)[1])
        ctx.save_for_backward(hidden_TD, weight_VD, ids_TK)
        return logprobs_TK

    @staticmethod
    def backward(ctx, d_logprobs_TK):
        """Minus the gradient of a token_loss whose target weights are the incoming gradients."""
        hidden_TD, weight_VD, ids_TK = ctx.saved_tensors
        with torch.enable_grad():
            hidden = hidden_TD.detach().requires_grad_(ctx.needs_input_grad[0])
            weight = weight_VD.detach().requires_grad_(ctx.needs_input_grad[1])
            ones_T = torch.ones(len(ids_TK), device=hidden.device)
            loss_sum, _ = _TokenLoss.apply(hidden, weight, ids_TK, -d_logprobs_TK, ones_T)
            wanted = [x for x in (hidden, weight) if x.requires_grad]
            grads = iter(torch.autograd.grad(loss_sum, wanted))
        return (*tuple(next(grads) if x.requires_grad else None for x in (hidden, weight)), None)
