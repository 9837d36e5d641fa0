"""Plain torch over chunks of logits."""

from functools import partial

import torch

from . import streamed


def unavailable_reason(device: torch.device) -> str | None:
    """Runs on every device torch has; None means available."""
    return None


class Rows:
    """Logits of a chunk of tokens over the rows of the head that this rank holds; see streamed.py."""

    def __init__(self, logits_CV, ids_CK, shard):
        self._dtype = logits_CV.dtype
        self._logits_CV = logits_CV.float()
        if shard is None:
            self._local_ids_CK, self._held_CK = ids_CK, None
            self.target_CK = self._logits_CV.gather(1, ids_CK)
        else:
            self._logits_CV[:, shard.stop - shard.start :] = -torch.inf
            self._local_ids_CK, self._held_CK = shard.local_ids(ids_CK)
            self.target_CK = self._logits_CV.gather(1, self._local_ids_CK).masked_fill_(~self._held_CK, 0.0)
        max_C1 = self._logits_CV.amax(-1, keepdim=True)
        self._exp_CV = self._logits_CV.sub_(max_C1).exp_()
        self._sum_C1 = self._exp_CV.sum(-1, keepdim=True)  # over the whole vocabulary, relative to max_C1
        self.lse_C1 = max_C1 + self._sum_C1.log()
        if shard:
            self.lse_C1, self.target_CK = shard.combine(self.lse_C1, self.target_CK)
            self._sum_C1 = (self.lse_C1 - max_C1).exp_()

    def gradient(self, scaled_CK):
        """sum(w) * softmax - scatter(w), in place of the logits; scaled_CK: target weights times token weight."""
        d_logits_CV = self._exp_CV.mul_(scaled_CK.sum(1, keepdim=True) / self._sum_C1)
        subtracted_CK = scaled_CK if self._held_CK is None else scaled_CK * self._held_CK
        return d_logits_CV.scatter_add_(1, self._local_ids_CK, -subtracted_CK).to(self._dtype)


token_loss = partial(streamed.token_loss, Rows)
token_logprobs = partial(streamed.token_logprobs, Rows)
