"""Rows gathered by number, and rows summed by number: each is the other's gradient.

Plain `index_select` and `index_add` would do, but their gradients would not: the first sums in the
rows' own dtype (in bf16 the small ones are lost), the second makes a float32 copy of every row.

Shapes: N rows, P gathered rows (a row 0 or more times), D model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemoe_ds.moe.experts import kernels
from gemoe_ds.moe.plan import RowMajor

_ROWS_AT_A_TIME = 256  # on a CPU, so that the wide copy stays in the cache


def gather_rows(x_ND: Tensor, ids_P: Tensor, order: RowMajor | None = None) -> Tensor:
    """x[ids], [P, D]. `order` of the ids, where there is Triton: its kernel makes the gradient."""
    rows_PD: Tensor = _Gather.apply(x_ND, ids_P, order)  # type: ignore[no-untyped-call]
    return rows_PD


def scatter_add_rows(
    rows_PD: Tensor, ids_P: Tensor, num_rows: int, order: RowMajor | None = None
) -> Tensor:
    """Row n sums the rows with ids == n, [N, D], in float32 at least; the dtype is kept.

    `order` of the ids, where there is Triton.
    """
    sums_ND: Tensor = _Sum.apply(rows_PD, ids_P, num_rows, order)  # type: ignore[no-untyped-call]
    return sums_ND


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, ids_P: Tensor, order: RowMajor | None) -> Tensor:
        ctx.ids_P, ctx.num_rows, ctx.order = ids_P, x_ND.shape[0], order
        return x_ND.index_select(0, ids_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None]:
        return _sums(grad_PD, ctx.ids_P, ctx.num_rows, ctx.order), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_PD: Tensor, ids_P: Tensor, num_rows: int, order: RowMajor | None
    ) -> Tensor:
        ctx.ids_P = ids_P
        return _sums(rows_PD, ids_P, num_rows, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None, None]:
        return grad_ND.index_select(0, ctx.ids_P), None, None, None


def _sums(rows_PD: Tensor, ids_P: Tensor, num_rows: int, order: RowMajor | None) -> Tensor:
    if order is not None:
        return kernels.segment_sum(rows_PD, *order)
    wide = torch.promote_types(rows_PD.dtype, torch.float32)
    sums_ND = torch.zeros(num_rows, rows_PD.shape[1], dtype=wide, device=rows_PD.device)
    parts = zip(
        torch.split(rows_PD, _ROWS_AT_A_TIME), torch.split(ids_P, _ROWS_AT_A_TIME), strict=True
    )
    for rows, ids in parts:
        sums_ND.index_add_(0, ids, rows.to(wide))
    return sums_ND.to(rows_PD.dtype)
