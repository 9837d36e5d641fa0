"""Three Triton kernels over both logits of a chunk, which the vendor's matrix product made and which keep their dtype.

Log-sum-exp of a row, once for each of the two; the expectations that make up the divergence; the gradient, in place of
the student's logits. Kernels: triton_kernels.py.
"""

import math
from functools import partial

import torch

from npd_kernels.launch import ROW_TILES, grid, triton_unavailable

from . import streamed


def unavailable_reason(device: torch.device) -> str | None:
    """None means available."""
    return triton_unavailable(device)


class Pair:
    """Both logits of a chunk of tokens over the rows of the heads that this rank holds; see streamed.py."""

    def __init__(self, logits_CV, teacher_CU, beta, shard):
        from . import triton_kernels

        num_rows, tiles = len(logits_CV), ROW_TILES[logits_CV.device.type]
        self._grid = grid(num_rows, logits_CV.device, matrix=False)
        self._logits_CV, self._teacher_CU = logits_CV, teacher_CU
        tops_2C, rests_2C = logits_CV.new_empty(2, 2, num_rows, dtype=torch.float32)
        for z, top_C, rest_C in zip((logits_CV, teacher_CU), tops_2C, rests_2C, strict=True):
            tile = tiles["logsumexp"]
            triton_kernels.logsumexp[self._grid](
                z, top_C, rest_C, num_rows, shard.rows, z.shape[1], BLOCK=tile.cols, **tile.options
            )
        self._lse = [x_C for x_2C in shard.logsumexp(tops_2C, rests_2C) for x_C in x_2C]
        # 0 and 1 are limits with kernels of their own; the logarithms are read for what lies between
        limit = {0: 0, 1: 1}.get(beta, 2)
        logs = (math.log(beta), math.log1p(-beta)) if limit == 2 else (0.0, 0.0)
        self._shape = (num_rows, shard.rows, logits_CV.shape[1], *logs)
        self._kernel = {"KIND": limit, "BLOCK": tiles["divergence"].cols, **tiles["divergence"].options}
        self._student_factor = 1 - beta if limit == 2 else 1.0
        terms_2C = torch.empty_like(tops_2C)
        triton_kernels.terms[self._grid](logits_CV, teacher_CU, *self._lse, *terms_2C, *self._shape, **self._kernel)
        teacher_C, self._student_kl_C = shard.sum(terms_2C)
        self.loss_C = (beta if limit == 2 else 1.0) * teacher_C + self._student_factor * self._student_kl_C

    def gradient(self, scale_C):
        from . import triton_kernels

        triton_kernels.gradient[self._grid](
            self._logits_CV,
            self._teacher_CU,
            *self._lse,
            self._student_kl_C,
            scale_C * self._student_factor,
            *self._shape,
            **self._kernel,
        )
        return self._logits_CV


dense_divergence = partial(streamed.dense_divergence, Pair)
