"""Log-probs of given answers under a model loaded here, packed, without gradients.

Dimensions: A answer tokens, K top-k, V vocabulary, C tokens in a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from npd_ascend.model.decoder import Decoder
from npd_ascend.packing import lay_out, pack_samples
from npd_ascend.teacher.scorer import AnswerScore
from npd_kernels.streaming import chunks


@dataclass(frozen=True, slots=True)
class LocalScorer:
    """A model in this process. vocab_size: rows of its head that stand for tokens."""

    model: Decoder
    vocab_size: int

    def score(self, rows: Sequence[tuple[Sequence[int], int]], *, top_k: int, pack_tokens: int) -> list[AnswerScore]:
        return score_answers(self.model, rows, top_k=top_k, vocab_size=self.vocab_size, pack_tokens=pack_tokens)


@torch.inference_mode()
def score_answers(
    model: Decoder, rows: Sequence[tuple[Sequence[int], int]], *, top_k: int, vocab_size: int, pack_tokens: int
) -> list[AnswerScore]:
    """Score the answers of `rows`, (token ids, prompt length) each; results in the order of `rows`.

    vocab_size: rows of the head that stand for tokens; what a model pads beyond them gets no probability.
    pack_tokens: tokens per forward; a longer sample is a pack of its own.
    """
    lengths = {f"{i:09d}": len(ids) for i, (ids, _) in enumerate(rows)}
    scores: dict[int, AnswerScore] = {}
    device = model.embed.weight.device
    for pack in pack_samples(lengths, max(pack_tokens, *lengths.values())):
        members = [int(name) for name in pack]
        layout = lay_out([rows[i] for i in members], device)
        hidden_AD = model(layout.token_ids_T, layout.cu_seqlens)[layout.predict_A]
        columns = _score_tokens(hidden_AD, model.head_weight_VD[:vocab_size], layout.answer_ids_A, top_k)
        parts = zip(*(np.split(column, np.cumsum(layout.answer_lens)[:-1]) for column in columns), strict=True)
        scores |= {i: AnswerScore(*part) for i, part in zip(members, parts, strict=True)}
    return [scores[i] for i in range(len(rows))]


def _score_tokens(hidden_AD, weight_VD, ids_A, top_k: int) -> list[np.ndarray]:
    """[logprob_A, topk_ids_AK, topk_logprobs_AK, entropy_A], never holding [A, V]."""
    columns = []
    for tokens, logits_CV in chunks(hidden_AD, weight_VD):
        logprobs_CV = torch.log_softmax(logits_CV.float(), -1)
        topk = logprobs_CV.topk(top_k, -1)
        entropy_C = -(logprobs_CV.exp() * logprobs_CV).sum(-1)
        given_C = logprobs_CV.gather(1, ids_A[tokens, None])[:, 0]
        columns.append((given_C, topk.indices.int(), topk.values, entropy_C))
    return [torch.cat(column).cpu().numpy() for column in zip(*columns, strict=True)]
