"""Losses over logits = hidden @ weight^T, formed chunk by chunk of tokens and never as [T, V].

The gradient is formed in the forward: what a chunk's logits become is multiplied out at once, so the head is multiplied
three times per token (logits, dHidden, dWeight) where recomputation would take four. One buffer serves all chunks: a
new one each time would cost its page faults, and the allocator keeps several.

Dimensions: T tokens, C tokens of a chunk, D hidden size, V rows of the head that this rank holds.
"""

from collections.abc import Callable, Iterator

import torch

# One chunk of logits, counted as float32. Enough rows that adding up dWeight, a pass over [V, D] per chunk, is little
# beside the products: on CPU 128 MiB is at 0.88 of their rate, 32 MiB at 0.75 (benchmarks/kernels.py --chunk-mib).
CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30, "npu": 2**30}

# (logits_CV, tokens, scale_C) -> (loss_C, d_logits_CV): the losses of these tokens, a slice or indices of T, and the
# gradient of sum(scale * loss), which may take the place of the logits. Without scale_C the gradient is not wanted.
ChunkLoss = Callable[
    [torch.Tensor, slice | torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]
]
# (sum_VD, d_logits_CV, hidden_CD): sum += d_logits^T hidden in place, sum float32
AddProduct = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def chunk_tokens(weight_VD: torch.Tensor) -> int:
    """Tokens whose float32 logits fit the device's CHUNK_BYTES."""
    return max(1, CHUNK_BYTES[weight_VD.device.type] // (4 * len(weight_VD)))


def chunks(hidden_TD: torch.Tensor, weight_VD: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """(tokens, logits_CV) in order; the logits lie in memory that the next chunk takes again. Not differentiable."""
    num_tokens, size = len(hidden_TD), chunk_tokens(weight_VD)
    buffer_CV = hidden_TD.new_empty(min(size, num_tokens), len(weight_VD))
    for start in range(0, num_tokens, size):
        tokens = slice(start, min(start + size, num_tokens))
        yield tokens, torch.mm(hidden_TD[tokens], weight_VD.T, out=buffer_CV[: tokens.stop - start])


def streamed_loss(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    token_weight_T: torch.Tensor,
    chunk_loss: ChunkLoss,
    add_product: AddProduct | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss_sum, loss_T): float32, the weighted sum with gradients to hidden and weight, each token's loss detached.

    add_product: how a chunk's part of dWeight is added to the sum; None: torch's products, in the dtype of the weight.
    Tokens of weight 0 are left out on CPU; elsewhere finding them would mean to wait for the device.
    """
    # parameters ask for gradients even where none are recorded, and forming them is most of the work
    if not torch.is_grad_enabled():
        hidden_TD, weight_VD = hidden_TD.detach(), weight_VD.detach()
    if token_weight_T.device.type == "cpu" and not token_weight_T.all():
        live_L = token_weight_T.nonzero()[:, 0]
        loss_sum, loss_L = _StreamedLoss.apply(
            hidden_TD[live_L],
            weight_VD,
            token_weight_T[live_L],
            lambda z, at, scale: chunk_loss(z, live_L[at], scale),
            add_product,
        )
        return loss_sum, torch.zeros_like(token_weight_T).index_copy_(0, live_L, loss_L)
    return _StreamedLoss.apply(hidden_TD, weight_VD, token_weight_T, chunk_loss, add_product)


class _StreamedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, token_weight_T, chunk_loss, add_product):
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        loss_T = torch.empty(len(hidden_TD), dtype=torch.float32, device=hidden_TD.device)
        d_hidden_TD = torch.empty_like(hidden_TD) if wants_hidden else None
        # bfloat16 would lose the small chunks of a long sum
        d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        narrow = wants_weight and add_product is None and weight_VD.dtype != torch.float32
        product_VD = torch.empty_like(weight_VD) if narrow else None

        for tokens, logits_CV in chunks(hidden_TD, weight_VD):
            scale_C = token_weight_T[tokens] if wants_hidden or wants_weight else None
            loss_T[tokens], d_logits_CV = chunk_loss(logits_CV, tokens, scale_C)
            if wants_hidden:
                torch.mm(d_logits_CV, weight_VD, out=d_hidden_TD[tokens])
            if narrow:
                d_weight_VD += torch.mm(d_logits_CV.T, hidden_TD[tokens], out=product_VD)
            elif wants_weight and add_product:
                add_product(d_weight_VD, d_logits_CV, hidden_TD[tokens])
            elif wants_weight:
                d_weight_VD.addmm_(d_logits_CV.T, hidden_TD[tokens])
            del logits_CV, d_logits_CV  # before the next chunk is made, or the two would be there together

        ctx.gradients = (d_hidden_TD, d_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(loss_T)
        return (token_weight_T * loss_T).sum(), loss_T

    @staticmethod
    def backward(ctx, d_loss_sum, _):
        """Scales in place: a second copy of [V, D] would double the peak, so one backward is all there is."""
        if ctx.gradients is None:
            raise RuntimeError("backward was already called; the gradients of this loss were given away")
        (d_hidden_TD, d_weight_VD), ctx.gradients = ctx.gradients, None
        if d_hidden_TD is not None:
            d_hidden_TD.mul_(d_loss_sum)
        if d_weight_VD is not None:
            d_weight_VD = d_weight_VD.mul_(d_loss_sum).to(ctx.weight_dtype)
        return d_hidden_TD, d_weight_VD, None, None, None
