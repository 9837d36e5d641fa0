"""The divergence as a stream over chunks of logits (streaming.py); what a chunk becomes is up to a `Pair` class.

A Pair class is made from (logits_CV, teacher_logits_CU, beta, shard), U the rows that stand for tokens, and has
    loss_C              float32, over the whole vocabulary whatever part of it this rank holds
    gradient(scale_C)   of sum(scale * loss) over this rank's rows, in the dtype and place of the student's logits
"""

import torch

from npd_kernels.streaming import chunk_tokens, streamed_loss


def dense_divergence(pair, hidden_TD, weight_VD, teacher_hidden_TE, teacher_weight_VE, token_weight_T, beta, shard):
    teacher_weight_UE = teacher_weight_VE[: shard.rows]
    rows = min(chunk_tokens(weight_VD), len(hidden_TD))
    buffer_CU = teacher_hidden_TE.new_empty(rows, shard.rows)

    def chunk_loss(logits_CV, tokens, scale_C):
        teacher_CU = torch.mm(teacher_hidden_TE[tokens], teacher_weight_UE.T, out=buffer_CU[: len(logits_CV)])
        chunk = pair(logits_CV, teacher_CU, beta, shard)
        return chunk.loss_C, None if scale_C is None else chunk.gradient(scale_C)

    return streamed_loss(hidden_TD, weight_VD, token_weight_T, chunk_loss)
