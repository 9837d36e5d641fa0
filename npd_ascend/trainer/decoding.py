"""Greedy decoding by the trainer's own model on the ranks it is cut over, with a cache of keys and values.

For what is watched while training; answers to train on come from the engines of npd_ascend.rollout.

Dimensions: B answers side by side, S tokens of each at once (its prompt, then one), P places an answer may have,
D hidden size, N query heads, G key/value heads and H head size of this rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from npd_ascend.device import to_device
from npd_ascend.model.decoder import Decoder
from npd_kernels.token_loss import entropies, greedy_ids


@dataclass(frozen=True, slots=True)
class Answer:
    token_ids: list[int]  # the end token included, where it was given
    entropies: np.ndarray  # float32, nats: of the distribution that each token was chosen from


@torch.inference_mode()
def greedy_answers(
    model: Decoder, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, eos_id: int, vocab_size: int
) -> list[Answer]:
    """The most likely token after what was given so far, until eos_id or max_new_tokens.

    All prompts at once. vocab_size: ids from there on are never given, though they keep their mass in the entropy.
    With sequence parallelism the number of prompts has to be a multiple of tp. All ranks of a tensor-parallel group
    call it alike and get the same.
    """
    device, count = model.embed.weight.device, len(prompts)
    lens = np.array([len(prompt) for prompt in prompts])
    ids_BS = np.zeros((count, lens.max()), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids_BS[row, : len(prompt)] = prompt
    cache = _Cache(model, count, int(lens.max()) + max_new_tokens)
    last_B, row_B = to_device(lens - 1, device), torch.arange(count, device=device)
    ids, places = to_device(ids_BS, device), torch.arange(ids_BS.shape[1], device=device).expand(count, -1)
    given, spread, ended_B = [], [], torch.zeros(count, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        hidden_BSD = _hidden(model, ids, places, cache)
        hidden_BD = hidden_BSD[row_B, last_B] if step == 0 else hidden_BSD[:, 0]
        ids_B = greedy_ids(hidden_BD, model.head_weight_VD, vocab_size=vocab_size, shard=model.vocab_shard)
        given.append(ids_B)
        spread.append(entropies(hidden_BD, model.head_weight_VD, shard=model.vocab_shard))
        ended_B |= ids_B == eos_id
        if ended_B.all():
            break
        ids, places = ids_B[:, None], (last_B + 1 + step)[:, None]
    return [
        Answer(ids[: _length(ids, eos_id)], entropy[: _length(ids, eos_id)])
        for ids, entropy in zip(torch.stack(given, 1).tolist(), torch.stack(spread, 1).cpu().numpy(), strict=True)
    ]


def _length(ids: list[int], eos_id: int) -> int:
    return ids.index(eos_id) + 1 if eos_id in ids else len(ids)


class _Cache:
    """Keys and values [B, P, G, H] of every layer. A place that an answer has not reached yet is masked."""

    def __init__(self, model: Decoder, rows: int, places: int):
        self.layers: list[tuple[Any, torch.Tensor, torch.Tensor]] = []
        for layer in model.layers:
            attention: Any = layer.attention
            shape = (rows, places, attention.split_sizes[1] // attention.head_dim, attention.head_dim)
            # zeros: a masked place counts 0 times what lies there, and 0 times NaN is NaN
            k_BPGH, v_BPGH = (model.embed.weight.new_zeros(shape) for _ in range(2))
            self.layers.append((layer, k_BPGH, v_BPGH))
        self.used = 0  # places from there on are masked for all


def _hidden(model: Decoder, ids_BS: torch.Tensor, places_BS: torch.Tensor, cache: _Cache) -> torch.Tensor:
    """[B, S, D] of tokens at these places, after the last norm; their keys and values enter the cache."""
    cache.used += ids_BS.shape[1]
    rotary = model.rotary(places_BS.flatten())
    x_TD = model.embed(ids_BS.flatten())
    for layer, *kept in cache.layers:
        q_k_v = layer.attention.rotated(layer.attention.qkv(layer.attention_norm(x_TD)), rotary)
        x_TD = x_TD + layer.attention.out(_attend(q_k_v, places_BS, kept, cache.used, layer.attention.head_dim**-0.5))
        x_TD = x_TD + layer.mlp(layer.mlp_norm(x_TD))
    return model.norm(x_TD).unflatten(0, ids_BS.shape)


def _attend(
    q_k_v: tuple[torch.Tensor, ...], places_BS: torch.Tensor, kept: Sequence[torch.Tensor], used: int, scale: float
) -> torch.Tensor:
    """[B * S, N * H]; every token sees the places of its answer up to its own."""
    q, k, v = (x.unflatten(0, places_BS.shape) for x in q_k_v)
    row_B1 = torch.arange(len(places_BS), device=q.device)[:, None]
    for kept_BPGH, new_BSGH in zip(kept, (k, v), strict=True):
        kept_BPGH[row_B1, places_BS] = new_BSGH
    k_BGPH, v_BGPH = (kept_BPGH[:, :used].transpose(1, 2) for kept_BPGH in kept)
    visible_B1SP = torch.arange(used, device=q.device) <= places_BS[:, None, :, None]
    out_BNSH = scaled_dot_product_attention(
        q.transpose(1, 2),
        k_BGPH,
        v_BGPH,
        attn_mask=visible_B1SP,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out_BNSH.transpose(1, 2).flatten(0, 1).flatten(1)
