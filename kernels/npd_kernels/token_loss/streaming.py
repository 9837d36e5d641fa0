"""The loss and its gradients chunk by chunk of tokens; what a chunk's logits become is up to a `Rows` class.

The gradient is formed in the forward: the logits of one chunk are turned into it in place and multiplied out at once,
so memory holds one chunk of [C, V] and never [T, V], and the head is multiplied three times per token (logits,
dHidden, dWeight) where recomputation would take four.

A Rows class is made from (hidden_CD, weight_VD, ids_CK, shard) and has
    lse_C1, target_CK   float32, over the whole vocabulary whatever part of it this rank holds
    gradient(w_CK)      sum(w) * softmax - scatter(w) over this rank's rows, in place of the logits
"""

import torch

# One chunk of float32 logits. Large enough for full GEMM speed, small enough to stay a rounding
# error beside the weights (benchmarks/train_step.py prints the peak).
CHUNK_BYTES = 32 * 2**20


def chunk_tokens(vocab_size: int) -> int:
    """Rows of float32 logits that fit CHUNK_BYTES."""
    return max(1, CHUNK_BYTES // (4 * vocab_size))


def token_loss(rows, hidden_TD, weight_VD, target_ids_TK, target_weights_TK, token_weight_T, shard):
    # parameters ask for gradients even where none are recorded, and forming them is most of the work
    if not torch.is_grad_enabled():
        hidden_TD, weight_VD = hidden_TD.detach(), weight_VD.detach()
    return _TokenLoss.apply(hidden_TD, weight_VD, target_ids_TK, target_weights_TK, token_weight_T, shard, rows)


def token_logprobs(rows, hidden_TD, weight_VD, ids_TK, shard):
    return _TokenLogprobs.apply(hidden_TD, weight_VD, ids_TK, shard, rows)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, ids_TK, weights_TK, token_weight_T, shard, rows_class):
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        num_tokens, dtype = hidden_TD.shape[0], hidden_TD.dtype
        loss_T = torch.empty(num_tokens, dtype=torch.float32, device=hidden_TD.device)
        d_hidden_TD = torch.empty_like(hidden_TD) if wants_hidden else None
        # bfloat16 would lose the small chunks of a long sum
        d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None

        size = chunk_tokens(weight_VD.shape[0])
        for rows in (slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)):
            chunk = rows_class(hidden_TD[rows], weight_VD, ids_TK[rows], shard)
            loss_T[rows] = (weights_TK[rows] * (chunk.lse_C1 - chunk.target_CK)).sum(1)
            if not (wants_hidden or wants_weight):
                continue
            d_logits_CV = chunk.gradient(weights_TK[rows] * token_weight_T[rows, None]).to(dtype)
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
        return d_hidden_TD, d_weight_VD, None, None, None, None, None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, ids_TK, shard, rows_class):
        logprobs_TK = torch.empty(ids_TK.shape, dtype=torch.float32, device=hidden_TD.device)
        size = chunk_tokens(weight_VD.shape[0])
        for hidden_CD, ids_CK, out_CK in zip(
            hidden_TD.split(size), ids_TK.split(size), logprobs_TK.split(size), strict=True
        ):
            chunk = rows_class(hidden_CD, weight_VD, ids_CK, shard)
            out_CK.copy_(chunk.target_CK - chunk.lse_C1)
        ctx.save_for_backward(hidden_TD, weight_VD, ids_TK)
        ctx.shard, ctx.rows_class = shard, rows_class
        return logprobs_TK

    @staticmethod
    def backward(ctx, d_logprobs_TK):
        """Minus the gradient of a token_loss whose target weights are the incoming gradients."""
        hidden_TD, weight_VD, ids_TK = ctx.saved_tensors
        with torch.enable_grad():
            hidden = hidden_TD.detach().requires_grad_(ctx.needs_input_grad[0])
            weight = weight_VD.detach().requires_grad_(ctx.needs_input_grad[1])
            ones_T = torch.ones(len(ids_TK), device=hidden.device)
            loss_sum, _ = _TokenLoss.apply(hidden, weight, ids_TK, -d_logprobs_TK, ones_T, ctx.shard, ctx.rows_class)
            wanted = [x for x in (hidden, weight) if x.requires_grad]
            grads = iter(torch.autograd.grad(loss_sum, wanted))
        return (*tuple(next(grads) if x.requires_grad else None for x in (hidden, weight)), None, None, None)
