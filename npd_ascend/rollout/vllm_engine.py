"""Generation with vLLM: continuous batching and a paged KV cache."""

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from npd_ascend.errors import UserError
from npd_ascend.model.decoder import PLAIN, Decoder
from npd_ascend.model.families import DecoderConfig, read_config
from npd_ascend.model.hf_weights import hf_shapes
from npd_ascend.rollout.engine import Completion, Request, Sampling, in_order
from npd_ascend.rollout.vllm_versions import (
    complete,
    finish_from_device,
    free_memory,
    join_sender,
    load_from_device,
    rank_count,
    receive_weights,
    replace_weights,
    reset_prefix_cache,
    start_llm,
    stop_llm,
    take_received_weights,
)
from npd_ascend.weights.collective import Manifest, packed_sizes
from npd_ascend.weights.control import TransferError
from npd_ascend.weights.device_group import DeviceGroupInfo
from npd_ascend.weights.receiver import WeightReceiver

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Received:
    """What a version from memory took: bytes, and seconds in the order in which they pass."""

    total_bytes: int
    gather_s: float  # of the trainer, who copied it when it was offered
    wait_s: float  # until the trainer sends: connection, and checksums if this worker is the first who asks
    transfer_s: float  # checksums compared; between devices most of the load is in it
    load_s: float  # into the model
    reset_s: float  # of the prefix cache


class VllmEngine:
    """eos_id, vocab_size: of the tokenizer; ids that the model pads beyond vocab_size are never sampled, though they
    keep their mass in the log-probs.

    max_model_len: tokens of the longest prompt with its answer. kv_cache_gib: memory for keys and values, taken at
    once; what does not fit waits. eager: vLLM compiles nothing, so it starts sooner and answers more slowly.
    device_backend: vLLM's, for weights that come from device to device. section: of the settings, which errors name.
    """

    # a shard that is made whole has equal bits each time, and one that is ended by another worker may not: answers that
    # took minutes are worth more
    separable = True

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        eos_id: int,
        vocab_size: int,
        max_model_len: int,
        kv_cache_gib: float,
        eager: bool = True,
        device_backend: str | None = None,
        section: str = "rollout",
    ):
        self._dtype, self._eos_id, self._vocab_size = dtype, eos_id, vocab_size
        self._max_model_len, self._kv_cache_bytes = max_model_len, int(kv_cache_gib * 2**30)
        self._eager, self._device_backend, self._section = eager, device_backend, section
        self._group: DeviceGroupInfo | None = None  # that its ranks have joined last
        self._llm: Any = None
        self._torn = False  # a load from device to device was begun and has not ended
        self._config: DecoderConfig = None
        self._shapes: dict[str, tuple[int, ...]] = {}

    def close(self) -> None:
        """Give the memory back; load_weights starts another vLLM."""
        if self._llm is None:
            return
        stop_llm(self._llm)
        self._llm, self._torn = None, False
        free_memory()

    def load_weights(self, folder: Path) -> None:
        """In place after the first time, but by a new start after a transfer between devices that broke off.

        UserError if the folder holds another network than the one before.
        """
        config = read_config(folder)
        if self._torn:
            _log.warning("vLLM is started again: the transfer that broke off has left it a part of two versions")
            self.close()
        if self._llm is None:
            if self._max_model_len > config.max_position:
                raise UserError(
                    f"{folder}/config.json: the longest prompt and its answer are {self._max_model_len} tokens, "
                    f"max_position_embeddings is {config.max_position}; ask for shorter answers"
                )
            self._llm = start_llm(
                folder,
                dtype=self._dtype,
                max_model_len=self._max_model_len,
                kv_cache_bytes=self._kv_cache_bytes,
                eager=self._eager,
                device_backend=self._device_backend,
                section=self._section,
            )
            self._config, self._shapes = config, _hf_shapes(config)
            return
        if config != self._config:
            raise UserError(f"{folder}/config.json: another network than the one whose weights it should replace")
        replace_weights(self._llm, folder, tied=config.tie_embeddings)
        reset_prefix_cache(self._llm)

    def receive_weights(self, receiver: WeightReceiver, version: int) -> Received:
        """Weights from the trainer's memory, in place of those that load_weights has brought before.

        TransferError if they do not come whole and unchanged within the receiver's time-out; load_weights takes them
        from disk then. Until it does, the engine has the weights that it had, or none if they were on their way from
        device to device. Anything else that vLLM raises while it loads leaves it with neither: the process is to end.
        """
        times = [time.perf_counter()]
        with receiver.transfer(version):
            if group := receiver.connect(rank_count(self._llm)):
                join_sender(self._llm, group)
                self._group = group if isinstance(group, DeviceGroupInfo) else None
            manifest = receiver.manifest(version)
            self._check(manifest)
            receiver.start()
            times.append(time.perf_counter())
            if self._group:
                self._torn = True
                load_from_device(self._llm, manifest, self._group)
                receiver.confirm()
            else:
                receive_weights(self._llm, manifest)
        times.append(time.perf_counter())
        take = finish_from_device if self._group else take_received_weights
        take(self._llm, tied=self._config.tie_embeddings)
        self._torn = False
        times.append(time.perf_counter())
        reset_prefix_cache(self._llm)
        times.append(time.perf_counter())
        return Received(manifest.total_bytes, manifest.gather_s, *(b - a for a, b in itertools.pairwise(times)))

    def _check(self, manifest: Manifest) -> None:
        """Of a version from memory, before any of it comes: a refusal afterwards may cost a start of vLLM."""
        if list(zip(manifest.names, map(tuple, manifest.shapes), strict=True)) != list(self._shapes.items()):
            raise TransferError("it is of another network than the one whose weights it should replace")
        if manifest.dtype != str(self._dtype).removeprefix("torch."):
            raise TransferError(f"it is in {manifest.dtype} and not in {self._dtype}")
        sizes = [numel * self._dtype.itemsize for numel in manifest.numels]
        if self._group and packed_sizes(sizes, self._group.bucket_bytes) != manifest.bucket_sizes:
            raise TransferError("the trainer does not cut it into the buckets that vLLM will wait for")

    def next_logprobs(self, contexts: Sequence[tuple[int, ...]], ids: Sequence[int]) -> np.ndarray:
        """By sampling where nothing else is allowed: scoring a prompt would pass the cache by."""
        self._needs_whole()
        requests = [Request(context, 1, 0) for context in contexts]
        done = complete(self._llm, requests, Sampling(1.0), eos_id=self._eos_id, allowed_ids=[[i] for i in ids])
        return np.concatenate([completion.logprobs for completion in in_order(done)])

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """Every call begins with an empty prefix cache, so a shard does not depend on the shards before it."""
        self._needs_whole()
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

    def _needs_whole(self) -> None:
        if self._torn:
            raise RuntimeError("a transfer broke off and left no weights: load_weights comes before anything else")


def _hf_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return hf_shapes(Decoder(config, PLAIN))
