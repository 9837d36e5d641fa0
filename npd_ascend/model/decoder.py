"""One plain Llama-family decoder, written for one rank and for packs.

Dimensions: T tokens in a pack, D hidden, N query heads, G key/value heads, H head size, V vocabulary.
The forward ends at the last hidden state: the head is multiplied inside the loss, chunk by chunk.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from npd_ascend.model.families import DecoderConfig
from npd_kernels.packed_attention import packed_attention


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, impl: str):
        super().__init__()
        self.impl, self.head_dim = impl, config.head_dim
        self.split_sizes = [n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
        self.qkv = nn.Linear(config.hidden_size, sum(self.split_sizes), bias=config.qkv_bias)
        self.out = nn.Linear(self.split_sizes[0], config.hidden_size, bias=config.o_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x_TD: torch.Tensor, cos_T1H: torch.Tensor, sin_T1H: torch.Tensor, cu_seqlens: Sequence[int]):
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(x_TD).split(self.split_sizes, -1))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos_T1H, sin_T1H), rotate(k, cos_T1H, sin_T1H)
        attended_TNH = packed_attention(q, k, v, cu_seqlens, self.head_dim**-0.5, impl=self.impl)
        return self.out(attended_TNH.flatten(1))


class Mlp(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x_TD).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, attention_impl: str):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, attention_impl)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x_TD, cos_T1H, sin_T1H, cu_seqlens):
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), cos_T1H, sin_T1H, cu_seqlens)
        return x_TD + self.mlp(self.mlp_norm(x_TD))


class Decoder(nn.Module):
    """`attention_impl` is a key of npd_kernels.packed_attention.IMPLEMENTATIONS."""

    def __init__(self, config: DecoderConfig, attention_impl: str):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, attention_impl) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight_VD(self) -> torch.Tensor:
        """The output matrix, the embedding itself where they are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def forward(self, token_ids_T: torch.Tensor, cu_seqlens: Sequence[int]) -> torch.Tensor:
        """Hidden states [T, D] after the last norm; attention and positions restart at every sample.

        token_ids_T: int64. cu_seqlens: host integers from 0 to T, see packed_attention.
        """
        cos_T1H, sin_T1H = self._rotary(cu_seqlens)
        x_TD = self.embed(token_ids_T)
        for layer in self.layers:
            x_TD = layer(x_TD, cos_T1H, sin_T1H, cu_seqlens)
        return self.norm(x_TD)

    def _rotary(self, cu_seqlens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self.embed.weight
        lengths = [end - start for start, end in itertools.pairwise(cu_seqlens)]
        positions_T = torch.cat([torch.arange(length) for length in lengths]).to(weight.device)
        half = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=weight.device)
        frequency_h = 1.0 / self.config.rope_theta ** (half / self.config.head_dim)
        angle_T1H = torch.outer(positions_T.float(), frequency_h).repeat(1, 2)[:, None]
        # the sign of rotate-half is folded into the sine, so that rotate() needs one roll and no negation
        sign_H = torch.ones(self.config.head_dim, device=weight.device)
        sign_H[: self.config.head_dim // 2] = -1
        return angle_T1H.cos().to(weight.dtype), (angle_T1H.sin() * sign_H).to(weight.dtype)


def rotate(x_TNH: torch.Tensor, cos_T1H: torch.Tensor, signed_sin_T1H: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in the half-split form of Llama (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    return x_TNH * cos_T1H + x_TNH.roll(x_TNH.shape[-1] // 2, dims=-1) * signed_sin_T1H


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
    """Normal weights with the config's std, zero biases, unit norms; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(0.0, model.config.init_std, generator=generator)
