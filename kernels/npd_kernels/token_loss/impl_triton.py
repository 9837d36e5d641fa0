"""Two Triton kernels over the logits of a chunk, which the vendor's matrix product made and which keep their dtype.

One reads them: log-sum-exp and target logits. One reads and writes them: the gradient, in place. Kernels:
triton_kernels.py.
"""

from functools import partial

import torch

from npd_kernels.launch import ROW_TILES, grid, triton_unavailable

from . import streamed


def unavailable_reason(device: torch.device) -> str | None:
    """None means available."""
    return triton_unavailable(device)


class Rows:
    """Logits of a chunk of tokens over the rows of the head that this rank holds; see streamed.py."""

    def __init__(self, logits_CV, ids_CK, shard):
        from . import triton_kernels

        self._logits_CV = logits_CV
        self._valid = logits_CV.shape[1]
        self._ids_CK = ids_CK
        if shard:
            self._valid = shard.stop - shard.start
            local_ids_CK, held_CK = shard.local_ids(ids_CK)
            self._ids_CK = local_ids_CK.masked_fill(~held_CK, -1)
        self._ids_CK = self._ids_CK.int().contiguous()
        num_rows, slots = ids_CK.shape
        tile = ROW_TILES[logits_CV.device.type]["token_loss"]
        self.lse_C1 = self._logits_CV.new_empty(num_rows, 1, dtype=torch.float32)
        self.target_CK = self._logits_CV.new_empty(num_rows, slots, dtype=torch.float32)
        triton_kernels.lse_and_targets[grid(num_rows, self._logits_CV.device, matrix=False)](
            self._logits_CV,
            self._ids_CK,
            self.lse_C1,
            self.target_CK,
            num_rows,
            self._valid,
            self._logits_CV.shape[1],
            K=slots,
            SLOTS=1 << (slots - 1).bit_length(),
            BLOCK=tile.cols,
            **tile.options,
        )
        if shard:
            self.lse_C1, self.target_CK = shard.combine(self.lse_C1, self.target_CK)

    def gradient(self, scaled_CK):
        """sum(w) * softmax - scatter(w), in place of the logits; scaled_CK: target weights times token weight."""
        from . import triton_kernels

        num_rows, slots = scaled_CK.shape
        tile = ROW_TILES[self._logits_CV.device.type]["token_loss"]
        triton_kernels.gradient[grid(num_rows, self._logits_CV.device, matrix=False)](
            self._logits_CV,
            self._ids_CK,
            self.lse_C1,
            scaled_CK.sum(1),
            scaled_CK.contiguous(),
            num_rows,
            self._valid,
            self._logits_CV.shape[1],
            K=slots,
            BLOCK=tile.cols,
            **tile.options,
        )
        return self._logits_CV


token_loss = partial(streamed.token_loss, Rows)
token_logprobs = partial(streamed.token_logprobs, Rows)
