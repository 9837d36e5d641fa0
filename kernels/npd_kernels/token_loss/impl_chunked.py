"""Plain torch, a few hundred tokens at a time; the gradient is formed in the forward pass.

The logits of one chunk are turned into their own gradient in place and multiplied out at once, so
memory holds one chunk of [C, V] and never [T, V], and the head is multiplied three times per token
(logits, dHidden, dWeight) where recomputation would take four.

Vocabulary-parallel: one all-gather of 1 + K numbers per token and rank (log-sum-exp of its rows, target
logits) is all that crosses the group. Every rank adds them up in the same order, so the loss has the same bits
everywhere.
"""

import torch
import torch.distributed as dist

# One chunk of float32 logits. Large enough for full GEMM speed, small enough to stay a rounding
# error beside the weights (benchmarks/train_step.py prints the peak).
CHUNK_BYTES = 32 * 2**20


def unavailable_reason(device: torch.device) -> str | None:
    """Runs on every device torch has; None means available."""
    return None


def chunk_tokens(vocab_size: int) -> int:
    """Rows of float32 logits that fit CHUNK_BYTES."""
    return max(1, CHUNK_BYTES // (4 * vocab_size))


def token_loss(hidden_TD, weight_VD, target_ids_TK, target_weights_TK, token_weight_T, shard=None):
    # parameters ask for gradients even where none are recorded, and forming them is most of the work
    if not torch.is_grad_enabled():
        hidden_TD, weight_VD = hidden_TD.detach(), weight_VD.detach()
    return _TokenLoss.apply(hidden_TD, weight_VD, target_ids_TK, target_weights_TK, token_weight_T, shard)


def token_logprobs(hidden_TD, weight_VD, ids_TK, shard=None):
    return _TokenLogprobs.apply(hidden_TD, weight_VD, ids_TK, shard)


class _Rows:
    """Logits of a chunk of tokens over the rows of the head that this rank holds."""

    def __init__(self, hidden_CD, weight_VD, ids_CK, shard):
        self._logits_CV = (hidden_CD @ weight_VD.T).float()
        if shard is None:
            self.local_ids_CK, self.held_CK = ids_CK, None
            self.target_CK = self._logits_CV.gather(1, ids_CK)
        else:
            self._logits_CV[:, shard.stop - shard.start :] = -torch.inf
            self.local_ids_CK, self.held_CK = shard.local_ids(ids_CK)
            self.target_CK = self._logits_CV.gather(1, self.local_ids_CK).masked_fill_(~self.held_CK, 0.0)
        max_C1 = self._logits_CV.amax(-1, keepdim=True)
        self._exp_CV = self._logits_CV.sub_(max_C1).exp_()
        self._sum_C1 = self._exp_CV.sum(-1, keepdim=True)  # over the whole vocabulary, relative to max_C1
        self.lse_C1 = max_C1 + self._sum_C1.log()
        if shard:
            mine = torch.cat([self.lse_C1, self.target_CK], 1)
            parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(shard.group))]
            dist.all_gather(parts, mine, group=shard.group)
            parts_RCK = torch.stack(parts)
            self.lse_C1, self.target_CK = parts_RCK[..., :1].logsumexp(0), parts_RCK[..., 1:].sum(0)
            self._sum_C1 = (self.lse_C1 - max_C1).exp_()

    def gradient(self, scaled_CK):
        """sum(w) * softmax - scatter(w), in place of the logits; scaled_CK: target weights times token weight."""
        d_logits_CV = self._exp_CV.mul_(scaled_CK.sum(1, keepdim=True) / self._sum_C1)
        subtracted_CK = scaled_CK if self.held_CK is None else scaled_CK * self.held_CK
        return d_logits_CV.scatter_add_(1, self.local_ids_CK, -subtracted_CK)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, ids_TK, weights_TK, token_weight_T, shard):
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        num_tokens, dtype = hidden_TD.shape[0], hidden_TD.dtype
        loss_T = torch.empty(num_tokens, dtype=torch.float32, device=hidden_TD.device)
        d_hidden_TD = torch.empty_like(hidden_TD) if wants_hidden else None
        # bfloat16 would lose the small chunks of a long sum
        d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None

        size = chunk_tokens(weight_VD.shape[0])
        for rows in (slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)):
            chunk = _Rows(hidden_TD[rows], weight_VD, ids_TK[rows], shard)
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
        return d_hidden_TD, d_weight_VD, None, None, None, None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, ids_TK, shard):
        logprobs_TK = torch.empty(ids_TK.shape, dtype=torch.float32, device=hidden_TD.device)
        size = chunk_tokens(weight_VD.shape[0])
        for hidden_CD, ids_CK, out_CK in zip(
            hidden_TD.split(size), ids_TK.split(size), logprobs_TK.split(size), strict=True
        ):
            chunk = _Rows(hidden_CD, weight_VD, ids_CK, shard)
            out_CK.copy_(chunk.target_CK - chunk.lse_C1)
        ctx.save_for_backward(hidden_TD, weight_VD, ids_TK)
        ctx.shard = shard
        return logprobs_TK

    @staticmethod
    def backward(ctx, d_logprobs_TK):
        """Minus the gradient of a token_loss whose target weights are the incoming gradients."""
        hidden_TD, weight_VD, ids_TK = ctx.saved_tensors
        with torch.enable_grad():
            hidden = hidden_TD.detach().requires_grad_(ctx.needs_input_grad[0])
            weight = weight_VD.detach().requires_grad_(ctx.needs_input_grad[1])
            ones_T = torch.ones(len(ids_TK), device=hidden.device)
            loss_sum, _ = _TokenLoss.apply(hidden, weight, ids_TK, -d_logprobs_TK, ones_T, ctx.shard)
            wanted = [x for x in (hidden, weight) if x.requires_grad]
            grads = iter(torch.autograd.grad(loss_sum, wanted))
        return (*tuple(next(grads) if x.requires_grad else None for x in (hidden, weight)), None, None)
