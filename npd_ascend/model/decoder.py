"""One plain Llama-family decoder, written for one rank and for packs.

Dimensions: T tokens in a pack, D hidden, N query heads, G key/value heads, H head size, V vocabulary.
The forward ends at the last hidden state: the head is multiplied inside the loss, chunk by chunk.

Recomputation in the backward (Korthikanti et al. 2022, arXiv 2205.05198), none of which changes a value:
`selective` gives up what is large and cheap (rotated q and k, attention's own state, the gated activation),
`full` everything but the input of each layer.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from npd_ascend.model.families import DecoderConfig
from npd_ascend.model.hf_weights import Piece, whole_pieces
from npd_kernels.layer_ops import rms_norm, rotary_tables, rotate, swiglu
from npd_kernels.packed_attention import packed_attention
from npd_kernels.token_loss import VocabShard


@dataclass(frozen=True, slots=True)
class Kernels:
    """Keys of IMPLEMENTATIONS in npd_kernels.packed_attention and npd_kernels.layer_ops."""

    attention: str
    layer: str


PLAIN = Kernels("sdpa", "torch")  # what every device has


class Norm(nn.RMSNorm):
    def __init__(self, size: int, eps: float | None, impl: str):
        super().__init__(size, eps)
        self.impl = impl

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, impl=self.impl)


class Linear(nn.Linear):
    """Made without values, which load_decoder or initialise give it. To draw some on the meta device would import
    torch._dynamo, a second of every process."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """The same."""

    def reset_parameters(self) -> None:
        pass


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, kernels: Kernels, recompute: bool):
        super().__init__()
        self.kernels, self.recompute, self.head_dim = kernels, recompute, config.head_dim
        self.split_sizes = config.qkv_rows
        self.qkv = Linear(config.hidden_size, sum(self.split_sizes), bias=config.qkv_bias)
        self.out = Linear(self.split_sizes[0], config.hidden_size, bias=config.o_bias)
        self.q_norm = Norm(config.head_dim, config.rms_norm_eps, kernels.layer) if config.qk_norm else None
        self.k_norm = Norm(config.head_dim, config.rms_norm_eps, kernels.layer) if config.qk_norm else None

    def forward(self, x_TD: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], cu_seqlens: Sequence[int]):
        return self.out(recomputed(self.recompute, self._attend, self.qkv(x_TD), rotary, cu_seqlens))

    def rotated(self, qkv: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]):
        """q [T, N, H], k and v [T, G, H] as attention takes them."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv.split(self.split_sizes, -1))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(x, rotary, impl=self.kernels.layer) for x in (q, k))
        return q, k, v

    def _attend(self, qkv: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], cu_seqlens: Sequence[int]):
        q, k, v = self.rotated(qkv, rotary)
        return packed_attention(q, k, v, cu_seqlens, self.head_dim**-0.5, impl=self.kernels.attention).flatten(1)


class Mlp(nn.Module):
    def __init__(self, config: DecoderConfig, kernels: Kernels, recompute: bool):
        super().__init__()
        self.activation, self.recompute = partial(swiglu, impl=kernels.layer), recompute
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.down(recomputed(self.recompute, self.activation, self.gate_up(x_TD)))


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, kernels: Kernels, recompute: bool):
        super().__init__()
        self.attention_norm = Norm(config.hidden_size, config.rms_norm_eps, kernels.layer)
        self.attention = Attention(config, kernels, recompute)
        self.mlp_norm = Norm(config.hidden_size, config.rms_norm_eps, kernels.layer)
        self.mlp = Mlp(config, kernels, recompute)

    def forward(self, x_TD, rotary, cu_seqlens):
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), rotary, cu_seqlens)
        return x_TD + self.mlp(self.mlp_norm(x_TD))


class Decoder(nn.Module):
    """`recompute`: off, selective or full.

    What npd_ascend.parallel changes when it cuts the model:
    pieces: parameter name -> the Hugging Face rectangles its rows are.
    vocab_shard: the rows of the head that are here; None: all.
    partial_gradients: parameters whose gradient here is a part of a sum over the tensor-parallel ranks.
    kv_copies: how many slots over all tensor-parallel ranks hold each key and value head.
    """

    def __init__(self, config: DecoderConfig, kernels: Kernels, recompute: str = "off"):
        super().__init__()
        self.config, self._kernels, self._recompute = config, kernels, recompute == "full"
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kernels, recompute == "selective") for _ in range(config.num_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps, kernels.layer)
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        self.pieces: dict[str, list[Piece]] = {
            name: whole_pieces(config, name, tuple(parameter.shape)) for name, parameter in self.named_parameters()
        }
        self.vocab_shard: VocabShard | None = None
        self.partial_gradients: frozenset[str] = frozenset()
        self.kv_copies = 1

    @property
    def head_weight_VD(self) -> torch.Tensor:
        """The output matrix, the embedding itself where they are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def forward(self, token_ids_T: torch.Tensor, cu_seqlens: Sequence[int]) -> torch.Tensor:
        """Hidden states [T, D] after the last norm; attention and positions restart at every sample.

        token_ids_T: int64. cu_seqlens: host integers from 0 to T, see packed_attention.
        """
        lengths = [end - start for start, end in itertools.pairwise(cu_seqlens)]
        # made there: a copy from the host would wait for all that the device has still to do
        device = self.embed.weight.device
        rotary = self.rotary(torch.cat([torch.arange(length, device=device) for length in lengths]))
        x_TD = self.embed(token_ids_T)
        for layer in self.layers:
            x_TD = recomputed(self._recompute, layer, x_TD, rotary, cu_seqlens)
        return self.norm(x_TD)

    def rotary(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What rotates q and k of tokens at these positions of their samples."""
        weight = self.embed.weight
        half = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=weight.device)
        frequency_h = 1.0 / self.config.rope_theta ** (half / self.config.head_dim)
        angle_TH = torch.outer(positions_T.float(), frequency_h).repeat(1, 2)
        return rotary_tables(angle_TH, weight.dtype, impl=self._kernels.layer)


def recomputed(recompute: bool, fn: Callable[..., torch.Tensor], *args) -> torch.Tensor:
    """fn(*args); with `recompute` nothing but the arguments is kept for the backward, which calls fn again."""
    if not (recompute and torch.is_grad_enabled()):
        return fn(*args)
    return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False)


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
    """Normal weights with the config's std, zero biases, unit norms; the same for the same seed on any layout."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
            continue
        parameter.zero_()
        if name.endswith("bias"):
            continue
        # the whole tensor is drawn, so that the stream of random numbers does not depend on the cut
        for _, pieces in itertools.groupby(model.pieces[name], key=lambda piece: piece.name):
            first, *replicas = pieces
            whole = torch.empty(first.shape).normal_(0.0, model.config.init_std, generator=generator)
            for piece in (first, *replicas):
                parameter[piece.at : piece.at + piece.rows] = whole[piece.index].to(parameter)
