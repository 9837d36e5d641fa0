"""Divergence between teacher and student over the whole vocabulary, from hidden states of both, never [T, V].

Dimensions: T tokens, D the student's and E the teacher's hidden size, V vocabulary.

With p_T, p_S the two distributions and m = beta p_T + (1 - beta) p_S (Agarwal et al. 2023, arXiv 2306.13649):
    beta = 0       KL(p_T || p_S), forward
    0 < beta < 1   beta KL(p_T || m) + (1 - beta) KL(p_S || m), generalised Jensen-Shannon
    beta = 1       KL(p_S || p_T), reverse
The first and the last are the limits of the middle one divided by beta and by 1 - beta, not its values, which are 0.

The gradient over the student's logits is p_S - p_T for beta = 0 and c p_S (log p_S - log m - KL(p_S || m)) otherwise,
with c = 1 - beta, and c = 1, m = p_T for beta = 1.
"""

from types import ModuleType

import torch

from npd_kernels.shard import VocabShard

from . import impl_chunked, impl_triton, reference

IMPLEMENTATIONS: dict[str, ModuleType] = {
    "reference": reference,
    "chunked": impl_chunked,
    "triton": impl_triton,
}


def dense_divergence(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    teacher_hidden_TE: torch.Tensor,
    teacher_weight_VE: torch.Tensor,
    token_weight_T: torch.Tensor,
    *,
    beta: float,
    shard: VocabShard | None = None,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (loss_sum, loss_T) as token_loss does: sum_t token_weight_t * divergence_t in nats, and each divergence.

    hidden_TD, weight_VD: the student's, float32 or bfloat16, one dtype; loss_sum is differentiable in both.
    teacher_hidden_TE, teacher_weight_VE: the teacher's, one dtype; no gradient goes there.
    token_weight_T: float32; tokens of weight 0 as in token_loss.
    shard: the rows that both heads hold, and how many of them are no padding; None: heads of V rows, all of them.

    Raises ValueError for what does not fit, RuntimeError if `impl` cannot run here.
    """
    num_tokens = len(token_weight_T)
    if not (hidden_TD.shape[0] == teacher_hidden_TE.shape[0] == num_tokens):
        raise ValueError(
            f"hidden {tuple(hidden_TD.shape)}, teacher's {tuple(teacher_hidden_TE.shape)} and {num_tokens} token "
            "weights do not fit; want one row per token"
        )
    if hidden_TD.shape[1] != weight_VD.shape[1] or teacher_hidden_TE.shape[1] != teacher_weight_VE.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden_TD.shape)} and weight {tuple(weight_VD.shape)}, or the teacher's "
            f"{tuple(teacher_hidden_TE.shape)} and {tuple(teacher_weight_VE.shape)}, do not fit"
        )
    if hidden_TD.dtype != weight_VD.dtype or teacher_hidden_TE.dtype != teacher_weight_VE.dtype:
        raise ValueError("hidden states and head must share a dtype, the student's and the teacher's each for itself")
    if shard is None and len(weight_VD) != len(teacher_weight_VE):
        raise ValueError(
            f"heads of {len(weight_VD)} and {len(teacher_weight_VE)} rows: say how many stand for tokens with "
            "shard=VocabShard(0, tokens, None)"
        )
    shard = shard or VocabShard(0, len(weight_VD), None)
    if not 0 < shard.rows <= min(len(weight_VD), len(teacher_weight_VE)):
        raise ValueError(
            f"rows {shard.start} to {shard.stop} do not fit heads of {len(weight_VD)} and {len(teacher_weight_VE)}"
        )
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} must lie between 0 (forward KL) and 1 (reverse KL)")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"dense_divergence impl {impl!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    if reason := IMPLEMENTATIONS[impl].unavailable_reason(hidden_TD.device):
        raise RuntimeError(f"dense_divergence impl {impl!r} cannot run here: {reason}")
    loss_sum, loss_T = IMPLEMENTATIONS[impl].dense_divergence(
        hidden_TD, weight_VD, teacher_hidden_TE.detach(), teacher_weight_VE.detach(), token_weight_T, beta, shard
    )
    return loss_sum, loss_T.masked_fill(token_weight_T == 0, 0.0)
