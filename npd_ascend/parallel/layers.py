"""Megatron's tensor-parallel layers (Shoeybi et al. 2019, arXiv 1909.08053) with sequence parallelism as an option
(Korthikanti et al. 2022, arXiv 2205.05198).

    column: y = f(x) W^T + b,  rows of W cut      f: identity forward, all-reduce backward
    row:    y = g(x W^T) + b,  columns of W cut   g: all-reduce forward, identity backward

With sequence parallelism what lies between a row and a column layer is cut over tokens: f gathers them
(backward: reduce-scatter), g reduce-scatters (backward: gather). Only a rank's own tokens are kept for the
backward, so the column layer gathers them once more there, as Megatron does.

Dimensions: T tokens, I input, O output features, V vocabulary, D hidden size.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from npd_ascend.model.decoder import Norm
from npd_ascend.parallel.mesh import Mesh, gather_rows, reduce_scatter_rows, sum_over


class ColumnLinear(nn.Module):
    """[T, I] (or [T/tp, I]) -> [T, O/tp], O/tp rows of the weight. weight, bias: this rank's part."""

    def __init__(self, weight_OI: nn.Parameter, bias_O: nn.Parameter | None, mesh: Mesh):
        super().__init__()
        self.weight, self.bias, self._mesh = weight_OI, bias_O, mesh

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        return _Column.apply(x_TI, self.weight, self.bias, self._mesh)


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TI, weight_OI, bias_O, mesh):
        ctx.save_for_backward(x_TI, weight_OI)
        ctx.mesh, ctx.has_bias = mesh, bias_O is not None
        whole_TI = gather_rows(x_TI, mesh.tp_group)[0] if mesh.sequence_parallel else x_TI
        return F.linear(whole_TI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx, d_y_TO):
        """The communication of d_x runs beside the product for d_weight."""
        (x_TI, weight_OI), mesh = ctx.saved_tensors, ctx.mesh
        gathering = None
        if mesh.sequence_parallel:
            x_TI, gathering = gather_rows(x_TI, mesh.tp_group, async_op=True)
        d_x_TI = d_y_TO @ weight_OI
        if gathering:
            gathering.wait()
            d_x_TI, reducing = reduce_scatter_rows(d_x_TI, mesh.tp_group, async_op=True)
        else:
            reducing = dist.all_reduce(d_x_TI, group=mesh.tp_group, async_op=True)
        d_weight_OI = d_y_TO.T @ x_TI
        d_bias_O = d_y_TO.sum(0) if ctx.has_bias else None
        reducing.wait()
        return d_x_TI, d_weight_OI, d_bias_O, None


class RowLinear(nn.Module):
    """[T, I/tp] -> [T, O] (or [T/tp, O]), I/tp columns of the weight; the bias is whole and added once."""

    def __init__(self, weight_OI: nn.Parameter, bias_O: nn.Parameter | None, mesh: Mesh):
        super().__init__()
        self.weight, self.bias, self._mesh = weight_OI, bias_O, mesh

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        y_TO = _Reduce.apply(F.linear(x_TI, self.weight), self._mesh)
        return y_TO if self.bias is None else y_TO + self.bias


class VocabularyEmbedding(nn.Module):
    """[T] global ids -> [T, D] (or [T/tp, D]); a rank without the row of an id adds zero."""

    def __init__(self, weight_VD: nn.Parameter, first_row: int, mesh: Mesh):
        super().__init__()
        self.weight, self._first_row, self._mesh = weight_VD, first_row, mesh

    def forward(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        local_T = token_ids_T - self._first_row
        elsewhere_T = (local_T < 0) | (local_T >= len(self.weight))
        part_TD = F.embedding(local_T.masked_fill(elsewhere_T, 0), self.weight)
        return _Reduce.apply(part_TD.masked_fill(elsewhere_T[:, None], 0.0), self._mesh)


class OutputNorm(Norm):
    """The last norm, followed by f: every rank multiplies all tokens with its rows of the head."""

    def __init__(self, weight_D: nn.Parameter, eps: float | None, impl: str, mesh: Mesh):
        super().__init__(len(weight_D), eps, impl)
        self.weight, self._mesh = weight_D, mesh

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return _Spread.apply(super().forward(x_TD), self._mesh)


class _Reduce(torch.autograd.Function):
    """g."""

    @staticmethod
    def forward(ctx, part_TO, mesh):
        ctx.mesh = mesh
        if mesh.sequence_parallel:
            return reduce_scatter_rows(part_TO, mesh.tp_group)[0]
        ctx.mark_dirty(part_TO)
        return sum_over(part_TO, mesh.tp_group)

    @staticmethod
    def backward(ctx, d_y):
        return gather_rows(d_y, ctx.mesh.tp_group)[0] if ctx.mesh.sequence_parallel else d_y, None


class _Spread(torch.autograd.Function):
    """f."""

    @staticmethod
    def forward(ctx, x, mesh):
        ctx.mesh = mesh
        return gather_rows(x, mesh.tp_group)[0] if mesh.sequence_parallel else x.view_as(x)

    @staticmethod
    def backward(ctx, d_y):
        if ctx.mesh.sequence_parallel:
            return reduce_scatter_rows(d_y, ctx.mesh.tp_group)[0], None
        # a copy: autograd may have given the same tensor to another branch
        return sum_over(d_y.clone(), ctx.mesh.tp_group), None
