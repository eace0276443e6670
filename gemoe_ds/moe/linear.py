"""The linear map of routers and predictors: in float32 at least, without a wide copy of its input.

Shapes: T tokens, D model, M outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gemoe_ds.moe import onednn

_ROWS_AT_A_TIME = 512  # on a CPU: 4 MB in float32 at D = 2048


class RouterLinear(nn.Linear):
    """A bias-free linear map in at least float32, whatever the activation dtype.

    A parameter that trains keeps float32 whatever the model's dtype (see docs/routers.md). Call
    the module, or `joined`, and leave its weight alone: ZeRO 3 gathers it for a call of the module.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False, dtype=torch.float32)

    def forward(self, x_TD: Tensor) -> Tensor:
        logits_TM: Tensor = _WideLinear.apply(x_TD, self.weight)  # type: ignore[no-untyped-call]
        return logits_TM


def joined(x_TD: Tensor, *linears: RouterLinear) -> tuple[Tensor, ...]:
    """`linear(x_TD)` of each, as one product: x is read once, and once more in the backward pass.

    A weight that ZeRO 3 holds in parts (it has a `ds_id`) is whole only in its module's own call.
    """
    if any(type(one) is not RouterLinear or hasattr(one.weight, "ds_id") for one in linears):
        return tuple(one(x_TD) for one in linears)
    weight_MD = torch.cat([one.weight for one in linears])
    logits_TM: Tensor = _WideLinear.apply(x_TD, weight_MD)  # type: ignore[no-untyped-call]
    return torch.split(logits_TM, [one.out_features for one in linears], dim=1)


class _WideLinear(torch.autograd.Function):
    """x @ weight.T in the wider dtype of both; keeps x as it came, and no wide copy of it.

    On a CPU the copy is made some rows at a time, so that it stays in the cache: fresh pages for a
    whole one (33 MB at T = 4096, D = 2048) take longer than the product.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_MD: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_MD)
        dtype = torch.promote_types(x_TD.dtype, weight_MD.dtype)
        weight = weight_MD.to(dtype)
        return torch.cat([_linear(rows.to(dtype), weight) for rows in _in_parts(x_TD)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TM: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, weight_MD = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        grad_x_TD, grad_MD = None, None
        if needs_x:
            weight_DM = weight_MD.to(grad_TM.dtype).t().contiguous()
            grad_x_TD = torch.empty_like(x_TD)
            parts = zip(_in_parts(grad_TM), _in_parts(grad_x_TD), strict=True)
            for grad_part, grad_x_part in parts:
                grad_x_part.copy_(_linear(grad_part, weight_DM))
        if needs_weight:
            grad_MD = torch.zeros_like(weight_MD, dtype=grad_TM.dtype)
            for grad_part, x_part in zip(_in_parts(grad_TM), _in_parts(x_TD), strict=True):
                grad_MD.addmm_(grad_part.t(), x_part.to(grad_TM.dtype))
            grad_MD = grad_MD.to(weight_MD.dtype)
        return grad_x_TD, grad_MD


def _linear(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight.T"""
    if onednn.usable(rows) and rows.shape[0]:
        return onednn.linear(rows, weight)
    return rows @ weight.t()


def _in_parts(rows_TD: Tensor) -> tuple[Tensor, ...]:
    on_cpu = rows_TD.device.type == "cpu"
    return torch.split(rows_TD, _ROWS_AT_A_TIME if on_cpu else max(rows_TD.shape[0], 1))
