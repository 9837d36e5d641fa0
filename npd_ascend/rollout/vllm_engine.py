"""Generation with vLLM: continuous batching and a paged KV cache."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from npd_ascend.errors import UserError
from npd_ascend.model.families import DecoderConfig, read_config
from npd_ascend.rollout.engine import Completion, Request, Sampling
from npd_ascend.rollout.vllm_versions import complete, replace_weights, reset_prefix_cache, start_llm


class VllmEngine:
    """eos_id, vocab_size: of the tokenizer; ids that the model pads beyond vocab_size are never sampled, though they
    keep their mass in the log-probs.

    max_model_len: tokens of the longest prompt with its answer. kv_cache_gib: memory for keys and values, taken at
    once; what does not fit waits.
    """

    def __init__(self, *, dtype: torch.dtype, eos_id: int, vocab_size: int, max_model_len: int, kv_cache_gib: float):
        self._dtype, self._eos_id, self._vocab_size = dtype, eos_id, vocab_size
        self._max_model_len, self._kv_cache_bytes = max_model_len, int(kv_cache_gib * 2**30)
        self._llm: Any = None
        self._config: DecoderConfig = None

    def load_weights(self, folder: Path) -> None:
        """In place after the first time; UserError if the folder then holds another network."""
        config = read_config(folder)
        if self._llm is None:
            if self._max_model_len > config.max_position:
                raise UserError(
                    f"{folder}/config.json: the longest prompt and its answer are {self._max_model_len} tokens, "
                    f"max_position_embeddings is {config.max_position}; lower rollout.max_new_tokens"
                )
            self._llm = start_llm(
                folder, dtype=self._dtype, max_model_len=self._max_model_len, kv_cache_bytes=self._kv_cache_bytes
            )
            self._config = config
            return
        if config != self._config:
            raise UserError(f"{folder}/config.json: another network than the one whose weights it should replace")
        replace_weights(self._llm, folder, tied=config.tie_embeddings)
        reset_prefix_cache(self._llm)

    def next_logprobs(self, contexts: Sequence[tuple[int, ...]], ids: Sequence[int]) -> np.ndarray:
        """By sampling where nothing else is allowed: scoring a prompt would pass the cache by."""
        requests = [Request(context, 1, 0) for context in contexts]
        done = complete(self._llm, requests, Sampling(1.0), eos_id=self._eos_id, allowed_ids=[[i] for i in ids])
        return np.concatenate([completion.logprobs for completion in done])

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Every call begins with an empty prefix cache, so a shard does not depend on the shards before it."""
        for request in requests:
            if len(request.token_ids) + request.max_new_tokens > self._max_model_len:
                raise ValueError(  # vLLM would end the answer there and call it its length
                    f"{len(request.token_ids)} prompt and {request.max_new_tokens} new tokens, but "
                    f"max_model_len={self._max_model_len}"
                )
        reset_prefix_cache(self._llm)
        padded = self._vocab_size < self._config.vocab_size
        tokens = list(range(self._vocab_size)) if padded else None
        allowed_ids = [tokens] * len(requests)
        return complete(self._llm, requests, sampling, eos_id=self._eos_id, allowed_ids=allowed_ids)
