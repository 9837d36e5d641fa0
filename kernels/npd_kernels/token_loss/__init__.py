"""Cross-entropy against a sparse soft target, from hidden states, without logits of [T, V] in memory.

Dimensions: T tokens, D hidden size, V vocabulary, K target slots per token.

With z = hidden @ weight^T, lse = logsumexp_V(z) and target weights w, the loss of token t is
    L_t = sum_k w_tk * (lse_t - z_t[id_tk])
and its gradient is dL_t/dz = (sum_k w_tk) * softmax(z) - scatter(w). Plain cross-entropy is K = 1,
w = 1; the NPD loss is K = 1 + top-k (design in npd_ascend/trainer/objectives.py).

Vocabulary-parallel: each rank of a group holds some rows of the head and passes a `VocabShard`; ids stay
global. The loss is then the same on every rank, and so is nothing else: d_hidden is this rank's part of a
sum over the group (what Megatron's f adds up in front of the head), d_weight that of its own rows.
"""

from types import ModuleType

import torch

from npd_kernels.shard import VocabShard

from . import impl_chunked, impl_mindspeed, impl_npu, impl_triton, reference
from .entropy import entropies
from .greedy import greedy_ids

__all__ = ["IMPLEMENTATIONS", "VocabShard", "entropies", "greedy_ids", "token_logprobs", "token_loss"]

IMPLEMENTATIONS: dict[str, ModuleType] = {
    "reference": reference,
    "chunked": impl_chunked,
    "triton": impl_triton,
    "npu": impl_npu,
    "mindspeed": impl_mindspeed,
}


def token_loss(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_ids_TK: torch.Tensor,
    target_weights_TK: torch.Tensor,
    token_weight_T: torch.Tensor,
    *,
    shard: VocabShard | None = None,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (loss_sum, loss_T).

    hidden_TD, weight_VD: float32 or bfloat16, one dtype.
    target_ids_TK: int64 in [0, V); an id may stand in several slots, their weights add up.
    target_weights_TK: float32, 0 in an unused slot (whose id must still be a valid one).
    token_weight_T: float32 factor of each token in the sum. On CPU tokens of weight 0 cost nothing. A device would
    have to be waited for to learn which they are, so callers leave them out beforehand, as trainer/objectives.py does.
    shard: the rows of the head that weight_VD holds; None: all of them. Everything but weight_VD must be equal
    on all ranks of its group.

    loss_sum: float32 scalar, sum_t token_weight_t * L_t in nats; differentiable in hidden and weight.
    loss_T: float32 [T], L_t in nats, detached and not weighted; 0 where token_weight_T is.

    Raises ValueError for shapes that do not fit, RuntimeError if `impl` cannot run here.
    """
    num_tokens, num_slots = target_ids_TK.shape
    if target_weights_TK.shape != (num_tokens, num_slots) or token_weight_T.shape != (num_tokens,):
        raise ValueError(
            f"targets do not fit: ids {tuple(target_ids_TK.shape)}, weights {tuple(target_weights_TK.shape)}, "
            f"token weights {tuple(token_weight_T.shape)}; want [T,K], [T,K], [T]"
        )
    module = _choose(impl, hidden_TD, weight_VD, num_tokens, shard)
    loss_sum, loss_T = module.token_loss(hidden_TD, weight_VD, target_ids_TK, target_weights_TK, token_weight_T, shard)
    return loss_sum, loss_T.masked_fill(token_weight_T == 0, 0.0)


def token_logprobs(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    ids_TK: torch.Tensor,
    *,
    shard: VocabShard | None = None,
    impl: str,
) -> torch.Tensor:
    """log p(id_tk) = z_t[id_tk] - lse_t for K ids per token; float32 [T, K], differentiable."""
    module = _choose(impl, hidden_TD, weight_VD, ids_TK.shape[0], shard)
    return module.token_logprobs(hidden_TD, weight_VD, ids_TK, shard)


def _choose(
    impl: str, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, num_tokens: int, shard: VocabShard | None
) -> ModuleType:
    if hidden_TD.dim() != 2 or hidden_TD.shape[0] != num_tokens or weight_VD.shape[1:] != hidden_TD.shape[1:]:
        raise ValueError(
            f"hidden {tuple(hidden_TD.shape)}, weight {tuple(weight_VD.shape)} and {num_tokens} target rows do not fit"
        )
    if hidden_TD.dtype != weight_VD.dtype:
        raise ValueError(f"hidden is {hidden_TD.dtype} but weight is {weight_VD.dtype}; want one dtype")
    if shard and not 0 < shard.stop - shard.start <= weight_VD.shape[0]:
        raise ValueError(f"rows {shard.start} to {shard.stop} of the head do not fit a weight of {weight_VD.shape[0]}")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"token_loss impl {impl!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    if reason := IMPLEMENTATIONS[impl].unavailable_reason(hidden_TD.device):
        raise RuntimeError(f"token_loss impl {impl!r} cannot run here: {reason}")
    return IMPLEMENTATIONS[impl]
