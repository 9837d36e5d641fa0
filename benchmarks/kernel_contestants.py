"""What benchmarks/kernels.py compares: each contestant is made from the inputs and is one forward and backward.

A step returns its value and then the gradients of q, k, v or of hidden states and head. "plain" comes first in each
table: ordinary torch code, and what errors are measured against.
"""

import importlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from npd_kernels.dense_divergence import dense_divergence
from npd_kernels.packed_attention import packed_attention
from npd_kernels.token_loss import token_loss

Step = Callable[[], list[torch.Tensor]]


@dataclass(frozen=True)
class Pack:
    """T tokens of samples of `lengths`; q [T, 12, 128], k and v [T, 6, 128]."""

    lengths: list[int]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    upstream: torch.Tensor

    @property
    def cu_seqlens(self) -> list[int]:
        return [0, *itertools.accumulate(self.lengths)]

    @property
    def flops(self) -> float:
        """Two products forward and five backward, over the visible half of each sample."""
        return 7 * 2 * self.q.shape[1] * self.q.shape[2] * sum(n * (n + 1) / 2 for n in self.lengths)


def make_pack(lengths: list[int], device: torch.device, dtype: torch.dtype, seed: int = 0) -> Pack:
    torch.manual_seed(seed)
    tokens = sum(lengths)
    q, k, v, upstream = (torch.randn(tokens, n, 128).to(device, dtype) for n in (12, 6, 6, 12))
    return Pack(lengths, q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), upstream)


def _attention(attend: Callable[[Pack], Callable[[], torch.Tensor]]) -> Callable[[Pack], Step]:
    def contestant(pack: Pack) -> Step:
        forward = attend(pack)

        def step():
            out = forward()
            return [out.detach(), *torch.autograd.grad(out, [pack.q, pack.k, pack.v], pack.upstream)]

        return step

    return contestant


def _ours(impl: str):
    return lambda pack: lambda: packed_attention(pack.q, pack.k, pack.v, pack.cu_seqlens, 128**-0.5, impl=impl)


def _dense_mask(pack: Pack):
    """One call with a block-diagonal causal mask."""
    sample = torch.repeat_interleave(torch.arange(len(pack.lengths)), torch.tensor(pack.lengths)).to(pack.q.device)
    mask = (sample[:, None] == sample[None, :]).tril_()

    def forward():
        q, k, v = (x.transpose(0, 1)[None] for x in (pack.q, pack.k, pack.v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return forward


def _varlen(pack: Pack):
    """torch.nn.attention.varlen: FlashAttention with cumulative lengths."""
    from torch.nn.attention.varlen import varlen_attn

    cu = torch.tensor(pack.cu_seqlens, dtype=torch.int32, device=pack.q.device)
    longest = max(pack.lengths)
    return lambda: varlen_attn(
        pack.q, pack.k, pack.v, cu, cu, longest, longest, scale=128**-0.5, window_size=(-1, 0), enable_gqa=True
    )


def _flex(pack: Pack):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sample = torch.repeat_interleave(torch.arange(len(pack.lengths)), torch.tensor(pack.lengths)).to(pack.q.device)
    tokens = sum(pack.lengths)
    mask = create_block_mask(
        lambda b, h, i, j: (sample[i] == sample[j]) & (i >= j), None, None, tokens, tokens, device=pack.q.device
    )
    compiled = torch.compile(flex_attention)

    def forward():
        q, k, v = (x.transpose(0, 1)[None] for x in (pack.q, pack.k, pack.v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return forward


ATTENTION = {
    "plain (dense mask)": _attention(_dense_mask),
    "npd sdpa": _attention(_ours("sdpa")),
    "npd triton": _attention(_ours("triton")),
    "npd npu": _attention(_ours("npu")),
    "torch varlen": _attention(_varlen),
    "torch flex": _attention(_flex),
}


@dataclass(frozen=True)
class Heads:
    """hidden [T, D], weight [V, D], the teacher's two, targets [T, 11] with weights, labels [T]."""

    hidden: torch.Tensor
    weight: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def step(self, loss: Callable[[], torch.Tensor]) -> Step:
        def run():
            value = loss()
            return [value.detach()[None], *torch.autograd.grad(value, [self.hidden, self.weight])]

        return run

    @property
    def ones(self) -> torch.Tensor:
        return torch.ones(len(self.hidden), device=self.hidden.device)


def make_heads(
    tokens: int, vocabulary: int, device: torch.device, dtype: torch.dtype, hidden: int = 1536, seed: int = 0
) -> Heads:
    torch.manual_seed(seed)
    student, teacher = (torch.randn(tokens, hidden).to(device, dtype) for _ in range(2))
    heads = ((torch.randn(vocabulary, hidden) / math.sqrt(hidden)).to(device, dtype) for _ in range(2))
    ids, weights = torch.randint(vocabulary, (tokens, 11)), torch.rand(tokens, 11).softmax(-1)
    weight, teacher_weight = heads
    return Heads(
        student.requires_grad_(), weight.requires_grad_(), teacher, teacher_weight, ids.to(device), weights.to(device)
    )


def _plain_loss(x: Heads) -> Step:
    def loss():
        logprobs = (x.hidden @ x.weight.T).float().log_softmax(-1)
        return -(x.weights * logprobs.gather(1, x.ids)).sum()

    return x.step(loss)


def _token_loss(impl: str):
    return lambda x: x.step(lambda: token_loss(x.hidden, x.weight, x.ids, x.weights, x.ones, impl=impl)[0])


def _plain_labels(x: Heads) -> Step:
    return x.step(lambda: cross_entropy((x.hidden @ x.weight.T).float(), x.ids[:, 0], reduction="sum"))


def _liger_labels(x: Heads) -> Step:
    function = importlib.import_module("liger_kernel.ops").LigerFusedLinearCrossEntropyFunction
    # hidden, weight, labels, bias, class weights, ignored label, z-loss, smoothing, reduction
    return x.step(lambda: function.apply(x.hidden, x.weight, x.ids[:, 0], None, None, -100, 0.0, 0.0, "sum")[0])


def _cut_labels(x: Heads) -> Step:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return x.step(lambda: function(x.hidden, x.weight, x.ids[:, 0], reduction="sum"))


# the public ones know hard labels only: their loss is another number, and the work is that of k = 0
LOSS = {
    "plain (full logits)": _plain_loss,
    "npd chunked": _token_loss("chunked"),
    "npd triton": _token_loss("triton"),
    "npd npu": _token_loss("npu"),
    "npd mindspeed": _token_loss("mindspeed"),
    "hard labels: plain": _plain_labels,
    "hard labels: Liger": _liger_labels,
    "hard labels: cut-cross-entropy": _cut_labels,
}


def _plain_kl(x: Heads) -> Step:
    def loss():
        student = (x.hidden @ x.weight.T).float().log_softmax(-1)
        teacher = (x.teacher_hidden @ x.teacher_weight.T).float().log_softmax(-1)
        return torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)

    return x.step(loss)


def _forward_kl(impl: str):
    def contestant(x: Heads) -> Step:
        teacher = (x.teacher_hidden, x.teacher_weight)
        return x.step(lambda: dense_divergence(x.hidden, x.weight, *teacher, x.ones, beta=0.0, impl=impl)[0])

    return contestant


def _liger_kl(x: Heads) -> Step:
    """Its value is a mean over tokens."""
    module = importlib.import_module("liger_kernel.transformers").LigerFusedLinearJSD(jsd_beta=0.0)
    return x.step(lambda: len(x.hidden) * module(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, None))


DIVERGENCE = {
    "plain (full logits)": _plain_kl,
    "npd chunked": _forward_kl("chunked"),
    "npd triton": _forward_kl("triton"),
    "Liger fused linear JSD": _liger_kl,
}
