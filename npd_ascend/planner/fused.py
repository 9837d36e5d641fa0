"""Stand-ins for fused operators that this machine does not have: they keep for the backward what those keep.

For counting only: outputs have the right shapes and no values. What torch_npu's operators keep was read from its
autograd; tests/ascend_wheel compares these with it to the byte.

Dimensions: T tokens, N query heads, G key/value heads, H head size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from npd_ascend.config import KernelConfig
from npd_ascend.model.decoder import Kernels
from npd_kernels import layer_ops, packed_attention

NAME = "counted"
_STATISTICS = 8  # numbers that attention keeps twice per token and head, in float32


@contextmanager
def countable(config: KernelConfig) -> Iterator[Kernels]:
    """The configured implementations as far as they run on this CPU, stand-ins for the others."""
    operations: list[tuple[Any, Any]] = [(_Attention, packed_attention), (_Layer, layer_ops)]
    for stand_in, operation in operations:
        operation.IMPLEMENTATIONS[NAME] = stand_in
    try:
        yield Kernels(_here(packed_attention, config.attention), _here(layer_ops, config.layer))
    finally:
        for _, operation in operations:
            del operation.IMPLEMENTATIONS[NAME]


def _here(operation: Any, impl: str) -> str:
    return NAME if operation.IMPLEMENTATIONS[impl].unavailable_reason(torch.device("cpu")) else impl


class _Attention:
    @staticmethod
    def unavailable_reason(device: torch.device) -> str | None:
        return None

    @staticmethod
    def packed_attention(q_TNH, k_TGH, v_TGH, cu_seqlens: Sequence[int], scale: float) -> torch.Tensor:
        return _FusedAttention.apply(q_TNH, k_TGH, v_TGH)


class _Layer:
    @staticmethod
    def unavailable_reason(device: torch.device) -> str | None:
        return None

    @staticmethod
    def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return _FusedNorm.apply(x, weight)

    @staticmethod
    def rotary_tables(angle_TH: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return angle_TH.to(dtype), angle_TH.to(dtype)

    @staticmethod
    def rotate(x_TNH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return _KeepsInput.apply(x_TNH, x_TNH.shape[-1])

    @staticmethod
    def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
        return _KeepsInput.apply(gate_up, gate_up.shape[-1] // 2)


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_TNH, k_TGH, v_TGH):
        out_TNH = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
        statistics = [q_TNH.new_empty(*q_TNH.shape[:2], _STATISTICS, dtype=torch.float32) for _ in range(2)]
        ctx.save_for_backward(q_TNH, k_TGH, v_TGH, out_TNH, *statistics)
        return out_TNH

    @staticmethod
    def backward(ctx, d_out):
        return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in ctx.saved_tensors[:3])


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, d_y):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _KeepsInput(torch.autograd.Function):
    """[..., n] -> [..., size]"""

    @staticmethod
    def forward(ctx, x, size):
        ctx.save_for_backward(x)
        return x.new_empty(*x.shape[:-1], size)

    @staticmethod
    def backward(ctx, d_y):
        return torch.empty_like(ctx.saved_tensors[0], memory_format=torch.contiguous_format), None
