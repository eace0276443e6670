"""The linear map of routers and predictors: in float32 at least, without a wide copy of its input.

Shapes: T tokens, D model, M outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gemoe_ds.moe.experts import onednn
from gemoe_ds.moe.opaque import opaque

_ROWS_AT_A_TIME = 512  # on a CPU: 4 MB in float32 at D = 2048
_FEW_ROWS = 32  # up to here oneDNN takes longer to repack the weight than MKL to multiply


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """`torch.autocast(device_type, enabled=False)`, which takes its time, where there is need."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class RouterLinear(nn.Linear):
    """A bias-free linear map in at least float32, whatever the activation dtype.

    A parameter that trains keeps float32 whatever the model's dtype (see docs/routers.md). Call
    the module, or `fused_linear`, and leave its weight alone: ZeRO 3 gathers it for such a call.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False, dtype=torch.float32)

    def forward(self, x_TD: Tensor) -> Tensor:
        (logits_TM,) = _products(x_TD, self.weight)
        return logits_TM


class FrozenLinear(RouterLinear):
    """One that never trains. Its weight is a buffer that does not persist: no optimizer, no
    checkpoint and no ZeRO stage ever sees it."""

    def __init__(self, weight_MD: Tensor) -> None:
        super().__init__(weight_MD.shape[1], weight_MD.shape[0])
        del self.weight
        self.register_buffer("weight", weight_MD.detach().float().clone(), persistent=False)


def fused_linear(x_TD: Tensor, *linears: RouterLinear) -> tuple[Tensor, ...]:
    """`linear(x_TD)` of each, as one product: x is read once, and once more in the backward pass.

    A weight that ZeRO 3 holds in parts (it has a `ds_id`) is whole only in its module's own call.
    """
    if any(type(one) is not RouterLinear or hasattr(one.weight, "ds_id") for one in linears):
        return tuple(one(x_TD) for one in linears)
    return _products(x_TD, *(one.weight for one in linears))


def _products(x_TD: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """x @ weight.T of each."""
    if torch.compiler.is_compiling():  # one operation of the graph, not what it is made of
        logits_TM = wide_linear(x_TD, torch.cat(weights))
        return _split(logits_TM, weights)
    if not torch.is_grad_enabled():
        return _split(_forward(x_TD, _cat(weights)), weights)
    return _WideLinear.apply(x_TD, *weights)  # type: ignore[no-untyped-call,no-any-return]


def _split(logits_TM: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of each weight."""
    if len(weights) == 1:
        return (logits_TM,)
    return torch.split(logits_TM, [len(weight) for weight in weights], dim=1)


class _WideLinear(torch.autograd.Function):
    """x @ weight.T of some weights [M, D] in the widest dtype; keeps x as it came, not wide.

    On a CPU the copy is made some rows at a time, so that it stays in the cache: fresh pages for a
    whole one (33 MB at T = 4096, D = 2048) take longer than the product. In the backward pass
    outputs that nothing used and weights that do not train cost nothing.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_TD, *weights)
        ctx.set_materialize_grads(False)
        return _split(_forward(x_TD, _cat(weights)), weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x_TD, *weights = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad
        used = [n for n, grad in enumerate(grads) if grad is not None]
        trained = [n for n in used if needs[n]]
        if not used:
            return None, *(None for _ in weights)
        grad_TM = _cat([grads[n] for n in used], dim=1)
        grad_x_TD: Tensor | None = None
        grad_weights: list[Tensor | None] = [None] * len(weights)
        if needs_x:
            grad_x_TD = _grad_x(grad_TM, x_TD, _cat([weights[n] for n in used]))
        if trained:
            if trained != used:
                grad_TM = _cat([grads[n] for n in trained], dim=1)
            grad_MD = _grad_weight(grad_TM, x_TD)
            found = torch.split(grad_MD, [len(weights[n]) for n in trained])
            for n, grad in zip(trained, found, strict=True):
                grad_weights[n] = grad.to(weights[n].dtype)
        return grad_x_TD, *grad_weights


def _forward(x_TD: Tensor, weight_MD: Tensor) -> Tensor:
    dtype = _wide(x_TD, weight_MD)
    weight_MD = weight_MD.to(dtype)
    return _cat([_linear(rows.to(dtype), weight_MD) for rows in _in_parts(x_TD)])


def _grad_x(grad_TM: Tensor, x_TD: Tensor, weight_MD: Tensor) -> Tensor:
    """In the dtype of x."""
    weight_DM = weight_MD.to(grad_TM.dtype).t().contiguous()
    grad_x_TD = torch.empty_like(x_TD)
    for grad_part, grad_x_part in zip(_in_parts(grad_TM), _in_parts(grad_x_TD), strict=True):
        grad_x_part.copy_(_linear(grad_part, weight_DM))
    return grad_x_TD


def _grad_weight(grad_TM: Tensor, x_TD: Tensor) -> Tensor:
    """In the dtype of the logits."""
    grad_MD = grad_TM.new_zeros(grad_TM.shape[1], x_TD.shape[1])
    for grad_part, x_part in zip(_in_parts(grad_TM), _in_parts(x_TD), strict=True):
        grad_MD.addmm_(grad_part.t(), x_part.to(grad_TM.dtype))
    return grad_MD


def _wide(x_TD: Tensor, weight_MD: Tensor) -> torch.dtype:
    """bfloat16 weights, of a model that was moved to it as a whole, are no reason for less."""
    return torch.promote_types(torch.promote_types(x_TD.dtype, weight_MD.dtype), torch.float32)


def _of_logits(x_TD: Tensor, weight_MD: Tensor) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0], weight_MD.shape[0], dtype=_wide(x_TD, weight_MD))


wide_linear = opaque(_forward, _of_logits)
_opaque_grad_x = opaque(_grad_x, lambda grad_TM, x_TD, weight_MD: torch.empty_like(x_TD))
_opaque_grad_weight = opaque(
    _grad_weight, lambda grad_TM, x_TD: grad_TM.new_empty(grad_TM.shape[1], x_TD.shape[1])
)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_TM: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x_TD, weight_MD = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad
    return (
        _opaque_grad_x(grad_TM, x_TD, weight_MD) if needs_x else None,
        _opaque_grad_weight(grad_TM, x_TD).to(weight_MD.dtype) if needs_weight else None,
    )


wide_linear.register_autograd(_backward, setup_context=_keep)


def _cat(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """One after the other; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=dim)


def _linear(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight.T"""
    if rows.shape[0] > _FEW_ROWS and onednn.usable(rows):
        return onednn.linear(rows, weight)
    return rows @ weight.t()


def _in_parts(rows_TD: Tensor) -> tuple[Tensor, ...]:
    if rows_TD.device.type != "cpu" or rows_TD.shape[0] <= _ROWS_AT_A_TIME:
        return (rows_TD,)
    return torch.split(rows_TD, _ROWS_AT_A_TIME)
