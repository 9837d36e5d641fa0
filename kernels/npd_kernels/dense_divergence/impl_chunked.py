"""Plain torch over chunks of logits."""

import math
from functools import partial

import torch

from . import streamed


def unavailable_reason(device: torch.device) -> str | None:
    """Runs on every device torch has; None means available."""
    return None


class Pair:
    """Both logits of a chunk of tokens over the rows of the heads that this rank holds; see streamed.py."""

    def __init__(self, logits_CV, teacher_CU, beta, shard):
        self._logits_CV, self._beta = logits_CV, beta
        self._student_CU = _log_softmax(logits_CV[:, : shard.rows].float(), shard)
        self._teacher_CU = _log_softmax(teacher_CU.float(), shard)
        self._mixture_CU = self._mixture()
        nothing_C = torch.zeros(len(logits_CV), device=logits_CV.device)
        # probabilities, for the gradient too
        self._of_teacher_CU = self._teacher_CU.exp() if beta < 1 else None
        self._of_student_CU = self._student_CU.exp() if beta > 0 else None
        teacher_C = self._expected(self._of_teacher_CU, self._teacher_CU) if beta < 1 else nothing_C
        student_C = self._expected(self._of_student_CU, self._student_CU) if beta > 0 else nothing_C
        teacher_C, student_C = shard.sum(torch.stack([teacher_C, student_C]))
        self._student_kl_C1 = student_C[:, None]
        self.loss_C = teacher_C + student_C if beta in (0, 1) else beta * teacher_C + (1 - beta) * student_C

    def _mixture(self):
        """log m; at the limits the distribution that the other one is measured against."""
        if self._beta == 0:
            return self._student_CU
        if self._beta == 1:
            return self._teacher_CU
        weighted_CU = self._student_CU + math.log(1 - self._beta)
        return torch.logaddexp(self._teacher_CU + math.log(self._beta), weighted_CU, out=weighted_CU)

    def _expected(self, p_CU, log_p_CU):
        """sum of p (log p - log m) over the rows at hand."""
        return (log_p_CU - self._mixture_CU).mul_(p_CU).sum(-1)

    def gradient(self, scale_C):
        if self._beta == 0:
            d_student_CU = self._student_CU.exp_().sub_(self._of_teacher_CU)
        else:
            ratio_CU = (self._student_CU - self._mixture_CU).sub_(self._student_kl_C1)
            d_student_CU = ratio_CU.mul_(self._of_student_CU).mul_(1 if self._beta == 1 else 1 - self._beta)
        rows = d_student_CU.shape[1]
        self._logits_CV[:, :rows] = d_student_CU.mul_(scale_C[:, None])
        self._logits_CV[:, rows:] = 0
        return self._logits_CV


def _log_softmax(z_CU: torch.Tensor, shard) -> torch.Tensor:
    """In place."""
    top_C1 = z_CU.amax(-1, keepdim=True)
    rest_C1 = z_CU.sub_(top_C1).exp().sum(-1, keepdim=True).log_()
    whole_top_C1, rest_C1 = shard.logsumexp(top_C1, rest_C1)
    return z_CU.sub_(whole_top_C1 - top_C1).sub_(rest_C1)


dense_divergence = partial(streamed.dense_divergence, Pair)
