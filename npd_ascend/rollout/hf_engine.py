"""Batched generation with transformers and its KV cache.

Dimensions: B requests still running, P padded prompt, V vocabulary.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from npd_ascend.rollout.engine import Completion, Request, Sampling


class HfEngine:
    """vocab_size: of the tokenizer; ids that the model pads beyond it are never sampled, though they keep their mass in
    the log-probs."""

    separable = False  # a prompt is padded to the longest of its batch, and `npd run` promises equal bits after a kill

    def __init__(self, *, dtype: torch.dtype, device: torch.device, eos_id: int, pad_id: int, vocab_size: int):
        self._dtype, self._device, self._eos_id, self._pad_id = dtype, device, eos_id, pad_id
        self._vocab_size = vocab_size
        self._model: Any = None

    def load_weights(self, folder: Path) -> None:
        # not at the top: it takes seconds, and many a process finds that it has nothing to generate
        from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # a second bar per load, beside our own
        config = json.loads((folder / "config.json").read_text())
        if config["model_type"] == "PanguEmbedded":
            # transformers has no such class; the same network is a Llama with bias on q, k, v and o
            same = {k: v for k, v in config.items() if k not in ("architectures", "auto_map", "model_type", "bias")}
            llama = LlamaConfig(**same | {"attention_bias": config["bias"]})
            self._model = LlamaForCausalLM.from_pretrained(folder, config=llama, dtype=self._dtype)
        else:
            self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=self._dtype, trust_remote_code=False)
        self._model.requires_grad_(False).to(self._device).eval()
        if self._dtype == torch.bfloat16:
            # the last place of every row is a view with gaps, for which bfloat16 on CPU copies the head once per row;
            # float32 does not, and its sums would come out in another order
            head = self._model.get_output_embeddings()
            head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """Rows that end leave the batch, so a few long answers do not carry the short ones along."""
        from transformers import DynamicCache

        limits = np.array([request.max_new_tokens for request in requests])
        uniforms = [np.random.Generator(np.random.PCG64(r.seed)).random(r.max_new_tokens) for r in requests]
        tokens: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        ended = [False] * len(requests)

        ids_BP, mask_BP = self._left_padded([request.token_ids for request in requests])
        positions_BP = (mask_BP.cumsum(-1) - 1).clamp(min=0)
        cache, rows = DynamicCache(), np.arange(len(requests))  # rows: the request of each batch row
        for step in range(limits.max()):
            logits_BV = self._model(
                input_ids=ids_BP,
                attention_mask=mask_BP,
                position_ids=positions_BP,
                past_key_values=cache,
                logits_to_keep=1,
            ).logits[:, -1]
            logprobs_BV = torch.log_softmax(logits_BV.float(), -1)
            draws_B = np.array([uniforms[row][step] if step < limits[row] else 0.0 for row in rows])
            tokens_B = pick_tokens(
                logprobs_BV[:, : self._vocab_size], torch.from_numpy(draws_B).to(self._device), sampling
            )
            picked_B = logprobs_BV.gather(1, tokens_B[:, None])[:, 0]
            for row, token, logprob in zip(rows, tokens_B.tolist(), picked_B.tolist(), strict=True):
                if ended[row]:
                    continue
                tokens[row].append(token)
                logprobs[row].append(logprob)
                if token == self._eos_id or step + 1 == limits[row]:
                    ended[row] = True
                    reason = "stop" if token == self._eos_id else "length"
                    yield int(row), Completion(tuple(tokens[row]), np.array(logprobs[row], np.float32), reason)

            running = torch.tensor([i for i, row in enumerate(rows) if not ended[row]], device=self._device)
            if len(running) == 0:
                break
            ids_BP, positions_BP = tokens_B[:, None], positions_BP[:, -1:] + 1
            mask_BP = torch.cat([mask_BP, mask_BP.new_ones(len(mask_BP), 1)], 1)
            if len(running) <= 0.75 * len(rows):  # copying the cache costs, so not for every row that ends
                cache.batch_select_indices(running)
                ids_BP, mask_BP, positions_BP = ids_BP[running], mask_BP[running], positions_BP[running]
                rows = rows[running.cpu().numpy()]

    @torch.inference_mode()
    def next_logprobs(self, contexts: Sequence[tuple[int, ...]], ids: Sequence[int]) -> np.ndarray:
        rows = {context: row for row, context in enumerate(dict.fromkeys(contexts))}  # each read once
        ids_BP, mask_BP = self._left_padded(list(rows))
        positions_BP = (mask_BP.cumsum(-1) - 1).clamp(min=0)
        logits_BV = self._model(
            input_ids=ids_BP, attention_mask=mask_BP, position_ids=positions_BP, logits_to_keep=1
        ).logits[:, -1]
        logprobs_BV = torch.log_softmax(logits_BV.float(), -1)
        return logprobs_BV[[rows[context] for context in contexts], list(ids)].cpu().numpy()

    def _left_padded(self, prompts: list[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, prompts))
        ids_BP = torch.tensor([[self._pad_id] * (width - len(p)) + list(p) for p in prompts], device=self._device)
        mask_BP = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._device)
        return ids_BP, mask_BP


def pick_tokens(logprobs_BV: torch.Tensor, draws_B: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """One token per row, int64 [B]: the inverse of the cumulative distribution at a uniform draw.

    draws_B: float64 in [0, 1). One draw per token is all the randomness there is, so the answer to a
    request does not depend on its neighbours in the batch.
    """
    if sampling.temperature == 0:
        return logprobs_BV.argmax(-1)
    probs_BV = torch.softmax(logprobs_BV / sampling.temperature, -1)
    if sampling.top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
        # the token that crosses top_p stays
        sorted_BV[sorted_BV.cumsum(-1) - sorted_BV >= sampling.top_p] = 0
        probs_BV = torch.zeros_like(probs_BV).scatter_(1, order_BV, sorted_BV)
    cumulative_BV = probs_BV.double().cumsum(-1)
    targets_B1 = (draws_B * cumulative_BV[:, -1])[:, None]
    return torch.searchsorted(cumulative_BV, targets_B1, right=True)[:, 0].clamp(max=probs_BV.shape[1] - 1)
