"""Generation with vLLM: continuous batching and a paged KV cache."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from npd_ascend.errors import UserError
from npd_ascend.model.decoder import PLAIN, Decoder
from npd_ascend.model.families import DecoderConfig, read_config
from npd_ascend.model.hf_weights import hf_shapes
from npd_ascend.rollout.engine import Completion, Request, Sampling
from npd_ascend.rollout.vllm_versions import (
    complete,
    join_sender,
    rank_count,
    receive_weights,
    replace_weights,
    reset_prefix_cache,
    start_llm,
    take_received_weights,
)
from npd_ascend.weights.control import TransferError
from npd_ascend.weights.receiver import WeightReceiver


@dataclass(frozen=True, slots=True)
class Received:
    """What a version from memory took: bytes, and seconds in the order in which they pass."""

    total_bytes: int
    gather_s: float  # of the trainer, who copied it when it was offered
    wait_s: float  # until the trainer sends: connection, and checksums if this worker is the first who asks
    transfer_s: float  # checksums compared
    load_s: float  # into the model
    reset_s: float  # of the prefix cache


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
        self._shapes: dict[str, tuple[int, ...]] = {}

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
            self._config, self._shapes = config, _hf_shapes(config)
            return
        if config != self._config:
            raise UserError(f"{folder}/config.json: another network than the one whose weights it should replace")
        replace_weights(self._llm, folder, tied=config.tie_embeddings)
        reset_prefix_cache(self._llm)

    def receive_weights(self, receiver: WeightReceiver, version: int) -> Received:
        """Weights from the trainer's memory, in place of those that load_weights has brought before.

        TransferError if they do not come whole and unchanged within the receiver's time-out; the engine then has the
        weights that it had, and load_weights takes the new ones from disk. Anything else that vLLM raises while it
        loads leaves it with neither: the process is to end.
        """
        times = [time.perf_counter()]
        with receiver.transfer(version):
            if group := receiver.connect(rank_count(self._llm)):
                join_sender(self._llm, group)
            manifest = receiver.manifest(version)
            if dict(zip(manifest.names, map(tuple, manifest.shapes), strict=True)) != self._shapes:
                raise TransferError("it is of another network than the one whose weights it should replace")
            receiver.start()
            times.append(time.perf_counter())
            receive_weights(self._llm, manifest)
        times.append(time.perf_counter())
        take_received_weights(self._llm, tied=self._config.tie_embeddings)
        times.append(time.perf_counter())
        reset_prefix_cache(self._llm)
        times.append(time.perf_counter())
        return Received(manifest.total_bytes, manifest.gather_s, *(b - a for a, b in itertools.pairwise(times)))

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


def _hf_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return hf_shapes(Decoder(config, PLAIN))
