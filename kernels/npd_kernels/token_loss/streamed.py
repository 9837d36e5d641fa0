"""The loss as one stream over chunks of logits (streaming.py); what a chunk's logits become is up to a `Rows` class.

A Rows class is made from (logits_CV, ids_CK, shard) and has
    lse_C1, target_CK   float32, over the whole vocabulary whatever part of it this rank holds
    gradient(w_CK)      sum(w) * softmax - scatter(w) over this rank's rows, in the dtype and place of the logits
add_product: see streaming.streamed_loss.
"""

from functools import partial

import torch

from npd_kernels.streaming import chunks, streamed_loss


def token_loss(rows, hidden_TD, weight_VD, ids_TK, weights_TK, token_weight_T, shard=None, *, add_product=None):
    def chunk_loss(logits_CV, tokens, scale_C):
        chunk, weights_CK = rows(logits_CV, ids_TK[tokens], shard), weights_TK[tokens]
        loss_C = (weights_CK * (chunk.lse_C1 - chunk.target_CK)).sum(1)
        return loss_C, None if scale_C is None else chunk.gradient(weights_CK * scale_C[:, None])

    return streamed_loss(hidden_TD, weight_VD, token_weight_T, chunk_loss, add_product)


def token_logprobs(rows, hidden_TD, weight_VD, ids_TK, shard=None, *, add_product=None):
    loss = partial(token_loss, rows, add_product=add_product)
    return _TokenLogprobs.apply(hidden_TD, weight_VD, ids_TK, shard, rows, loss)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, ids_TK, shard, rows, loss):
        logprobs_TK = torch.empty(ids_TK.shape, dtype=torch.float32, device=hidden_TD.device)
        for tokens, logits_CV in chunks(hidden_TD, weight_VD):
            chunk = rows(logits_CV, ids_TK[tokens], shard)
            logprobs_TK[tokens] = chunk.target_CK - chunk.lse_C1
        ctx.save_for_backward(hidden_TD, weight_VD, ids_TK)
        ctx.shard, ctx.loss = shard, loss
        return logprobs_TK

    @staticmethod
    def backward(ctx, d_logprobs_TK):
        """Minus the gradient of a token_loss whose target weights are the incoming gradients."""
        hidden_TD, weight_VD, ids_TK = ctx.saved_tensors
        with torch.enable_grad():
            hidden = hidden_TD.detach().requires_grad_(ctx.needs_input_grad[0])
            weight = weight_VD.detach().requires_grad_(ctx.needs_input_grad[1])
            ones_T = torch.ones(len(ids_TK), device=hidden.device)
            loss_sum, _ = ctx.loss(hidden, weight, ids_TK, -d_logprobs_TK, ones_T, ctx.shard)
            wanted = [x for x in (hidden, weight) if x.requires_grad]
            grads = iter(torch.autograd.grad(loss_sum, wanted))
        return (*tuple(next(grads) if x.requires_grad else None for x in (hidden, weight)), None, None, None, None)
