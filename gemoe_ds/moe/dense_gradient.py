"""DenseMixer's gradient (Yao et al. 2025, densemixer 1.0.1): gates learn from experts not chosen.

The forward pass, and all gradients but those of the weights of experts that were not chosen, stay
as they are. For these the outputs are worked out in the backward pass, a part of the experts at a
time, and the gradient is straight through: dL/dw_i = <dL/dy, E_i(x)>.

Shapes: T tokens, D model, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Apply = Callable[[Tensor, Tensor, Tensor], Tensor]  # x_TD, weights_TE, mask_TE -> y_TD


def with_dense_gradient(
    y_TD: Tensor, weights_TE: Tensor, x_TD: Tensor, others_TE: Tensor, parts: int, apply: Apply
) -> Tensor:
    """y_TD; `others_TE` (bool) are the pairs whose weights get a gradient beside those chosen.

    `apply` gives the weighted sum of experts. It is called `parts` times, on every rank. The
    experts of a part are spread evenly, over ranks that hold blocks of them too.
    """
    given = y_TD, weights_TE, x_TD, others_TE, parts, apply
    result: Tensor = _Dense.apply(*given)  # type: ignore[no-untyped-call]
    return result


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y_TD: Tensor,
        weights_TE: Tensor,
        x_TD: Tensor,
        others_TE: Tensor,
        parts: int,
        apply: Apply,
    ) -> Tensor:
        ctx.save_for_backward(x_TD, others_TE)
        ctx.parts, ctx.run, ctx.dtype = parts, apply, weights_TE.dtype
        device = x_TD.device.type
        cast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        ctx.autocast = torch.autocast(device, cast[1], enabled=cast[0])
        return y_TD.view_as(y_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, others_TE = ctx.saved_tensors
        expert_E = torch.arange(others_TE.shape[1], device=x_TD.device)
        grad_TE = torch.zeros(others_TE.shape, dtype=ctx.dtype, device=x_TD.device)
        for part in range(ctx.parts):
            with torch.enable_grad(), ctx.autocast:
                ones_TE = torch.ones_like(grad_TE).requires_grad_()
                y_TD = ctx.run(x_TD.detach(), ones_TE, others_TE & (expert_E % ctx.parts == part))
            grad_TE += torch.autograd.grad(y_TD, ones_TE, grad_TD)[0]
        return grad_TD, grad_TE, None, None, None, None
