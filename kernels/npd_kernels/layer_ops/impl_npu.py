"""torch_npu's fused operators, differentiable as they are (op-plugin: npu_rms_norm, npu_rotary_mul, npu_swiglu).

First arguments are passed by position: the compiled schemas name them otherwise than the documentation.
"""

import torch

from npd_kernels.launch import npu_unavailable

# npu_rotary_mul in its four-dimensional form: an even head size below 896, fewer than 1,000 heads
_ROTARY_HEAD_SIZE, _ROTARY_HEADS = 894, 999


def unavailable_reason(device: torch.device) -> str | None:
    """None means available."""
    return npu_unavailable(device)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    import torch_npu

    return torch_npu.npu_rms_norm(x, weight, eps)[0]


def rotary_tables(angle_TH: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, T, 1, H], for the four-dimensional form that every version of the operator takes."""
    return angle_TH.cos().to(dtype)[None, :, None], angle_TH.sin().to(dtype)[None, :, None]


def rotate(x_TNH: torch.Tensor, cos_1T1H: torch.Tensor, sin_1T1H: torch.Tensor) -> torch.Tensor:
    import torch_npu

    check_rotary(x_TNH, cos_1T1H, sin_1T1H)
    return torch_npu.npu_rotary_mul(x_TNH[None], cos_1T1H, sin_1T1H, "half")[0]


def check_rotary(x_TNH: torch.Tensor, *tables: torch.Tensor) -> None:
    """ValueError for what npu_rotary_mul would take and should not."""
    tokens, heads, head_size = x_TNH.shape
    for table in tables:
        if table.shape != (1, tokens, 1, head_size) or table.dtype != x_TNH.dtype:
            raise ValueError(
                f"a rotary table is {table.dtype} {tuple(table.shape)}; want {x_TNH.dtype} "
                f"{(1, tokens, 1, head_size)}, as rotary_tables makes it"
            )
    if head_size % 2 or head_size > _ROTARY_HEAD_SIZE:
        raise ValueError(
            f"npu_rotary_mul takes even head sizes up to {_ROTARY_HEAD_SIZE}; got {head_size}. Use kernels.layer: torch"
        )
    if heads > _ROTARY_HEADS:
        raise ValueError(f"npu_rotary_mul takes up to {_ROTARY_HEADS} heads; got {heads}. Raise parallel.tp")


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    import torch_npu

    return torch_npu.npu_swiglu(gate_up.contiguous(), dim=-1)
