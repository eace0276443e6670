"""The expert FFNs of a ragged plan as one differentiable function: gather, FFN, weighted sum.

One function from rows to rows: what lies between (A rows of D, 2 F and F numbers) is the business
of the path that suits the device. Autograd keeps the gate and up projections, [A, 2 F], and no
more; the backward pass forms the rest anew, products excepted. It multiplies as much as the
forward pass does, and as much again if the experts train.

The combine weight enters before the down projection, which is linear: so its gradient needs F
numbers a row, not D.

Shapes: N rows, A assignments, E experts, D model, F expert width, G = 2 F.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemoe_ds.moe.experts import by_expert, grouped
from gemoe_ds.moe.experts.weights import SMALL_FFN, ExpertWeights
from gemoe_ds.moe.linear import without_autocast
from gemoe_ds.moe.plan import RoutingPlan
from gemoe_ds.moe.triton_launch import available


def ragged_ffn(x_ND: Tensor, plan: RoutingPlan, expert_weights: ExpertWeights) -> Tensor:
    """y_ND = sum of weight * W_down (silu(W_gate x) * W_up x) over the assignments of each row.

    Products run in their own dtype, sums in float32 at least, and the result has the dtype of
    `x_ND`. Differentiable once, in x, the plan's weights, and the experts if they ask for it.
    """
    weights = plan.weights_A, expert_weights.gate_up_EGD, expert_weights.down_EDF
    # Within a function of autograd parameters want a gradient whether or not one is wanted here.
    if torch.is_grad_enabled() and any(one.requires_grad for one in (x_ND, *weights)):
        y_ND: Tensor = _RaggedFFN.apply(  # type: ignore[no-untyped-call]
            x_ND, *weights, plan, expert_weights
        )
        return y_ND
    return _forward(x_ND, plan, expert_weights, keep=False)[0]


def _forward(
    x_ND: Tensor, plan: RoutingPlan, expert_weights: ExpertWeights, *, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """y_ND in the dtype of x, and what the path's backward pass needs, if asked."""
    if not plan.weights_A.numel():  # no product has to take a matrix without rows
        return torch.zeros_like(x_ND), []
    with without_autocast(x_ND.device.type):
        path = _path(x_ND, expert_weights)
        y_ND, kept = path.forward(x_ND, plan, expert_weights, keep=keep)
    return y_ND.to(x_ND.dtype), kept


def _path(x_ND: Tensor, expert_weights: ExpertWeights) -> ModuleType:
    if expert_weights.one_by_one and not available(x_ND.device):
        return by_expert
    return path_for(x_ND.device, expert_weights.dtype, x_ND.shape[1], expert_weights.width)


# What the grouped path may be used for: torch's grouped product takes these, and is fast where it
# is one kernel (GPUs), or where a call an expert would take longer than the product (small FFNs).
_GROUPED_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}


def path_for(device: torch.device, dtype: torch.dtype, d_model: int, width: int) -> ModuleType:
    """The module whose `forward` and `backward` are the fastest here; see docs/performance.md."""
    aligned = all(n * dtype.itemsize % 16 == 0 for n in (d_model, width))  # of whole 16 bytes
    takes = aligned and dtype in _GROUPED_DTYPES.get(device.type, ())
    worth = device.type == "cuda" or d_model * width <= SMALL_FFN
    path: ModuleType = grouped if takes and worth else by_expert
    return path


class _RaggedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weights_A: Tensor,
        gate_up_EGD: Tensor,
        down_EDF: Tensor,
        plan: RoutingPlan,
        expert_weights: ExpertWeights,
    ) -> Tensor:
        plan = replace(plan, weights_A=weights_A)
        y_ND, kept = _forward(x_ND, plan, expert_weights, keep=True)
        ctx.path, ctx.plan, ctx.expert_weights = (
            _path(x_ND, expert_weights),
            replace(plan, weights_A=weights_A[:0]),
            expert_weights,
        )
        ctx.save_for_backward(x_ND, weights_A, *kept)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weights_A, *kept = ctx.saved_tensors
        if not weights_A.numel():
            inputs = x_ND, weights_A, ctx.expert_weights.gate_up_EGD, ctx.expert_weights.down_EDF
            wanted = zip(inputs, ctx.needs_input_grad, strict=False)
            return *(torch.zeros_like(one) if needs else None for one, needs in wanted), None, None
        plan = replace(ctx.plan, weights_A=weights_A)
        with torch.autocast(x_ND.device.type, enabled=False):
            grads = ctx.path.backward(
                grad_ND,
                x_ND,
                plan,
                ctx.expert_weights,
                kept,
                needs_x=ctx.needs_input_grad[0],
                needs_experts=ctx.needs_input_grad[2],
            )
        return *grads, None, None
