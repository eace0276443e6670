"""Frozen linear maps of attention, head and vision tower in 8 or 4 bits (`model.dense_dtype`).

They are dequantised for each product, some rows at a time, and never kept. Embeddings, norms and
convolutions stay as they are, and so does a weight that is an embedding too.
Shapes: K inputs, M outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gemoe_ds.hf_io.targets import PassedOn, Target
from gemoe_ds.moe.experts.quantised import QuantisedWeight
from gemoe_ds.moe.router import Router

_AT_ONCE = 2**24  # numbers of a weight
_FEW = 8  # inputs or outputs, as a gate has them; such a map stays as it is


class QuantisedLinear(nn.Linear):
    """y = W x + b, [.., K] -> [.., M], in the dtype of autocast or x; the gradient of x alone."""

    def __init__(self, format_name: str, linear: nn.Linear, dtype: torch.dtype) -> None:
        """Of undefined values; the bias stays the parameter that it is."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.quantised = QuantisedWeight(format_name, (self.out_features, self.in_features))
        self.bias, self.dtype = linear.bias, dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[M, K] in the model's dtype, made anew each time: for code that looks at it."""
        return self.quantised.dequantised(slice(None), self.dtype)

    def forward(self, x_K: Tensor) -> Tensor:
        device = x_K.device.type
        if torch.is_autocast_enabled(device):
            x_K = x_K.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            y_M: Tensor = _Product.apply(x_K, self.quantised)
        return y_M if self.bias is None else y_M + self.bias.to(y_M.dtype)


class _Product(torch.autograd.Function):
    """x @ W.T; nothing is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_K: Tensor, weight_MK: QuantisedWeight) -> Tensor:
        ctx.weight_MK = weight_MK
        parts = [
            nn.functional.linear(x_K, _dequantised(weight_MK, rows, x_K.dtype))
            for rows in _rows(weight_MK)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor, None]:
        weight_MK: QuantisedWeight = ctx.weight_MK
        first, *others = (
            grad_M[..., rows] @ _dequantised(weight_MK, rows, grad_M.dtype)
            for rows in _rows(weight_MK)
        )
        if not others:
            return first, None
        sum_K = first.to(torch.promote_types(grad_M.dtype, torch.float32))
        for part in others:
            sum_K += part
        return sum_K.to(grad_M.dtype), None


def _dequantised(weight_MK: QuantisedWeight, rows: slice, dtype: torch.dtype) -> Tensor:
    return weight_MK.dequantised(rows, dtype, until_next=True)


def _rows(weight_MK: QuantisedWeight) -> Iterator[slice]:
    num_rows, num_inputs = weight_MK.shape
    step = max(1, _AT_ONCE // num_inputs)
    return (slice(first, first + step) for first in range(0, num_rows, step))


def linear_maps(model: nn.Module, besides: Iterable[Tensor] = ()) -> dict[str, nn.Linear]:
    """By path those that can be quantised: not tiny, not a router's, their weight theirs alone.

    `besides`: weights that are left out, as gates of blocks that are not converted yet.
    """
    left_out = {id(weight) for weight in besides}
    of_routers = {id(m) for r in model.modules() if isinstance(r, Router) for m in r.modules()}
    users = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    return {
        path: module
        for path, module in model.named_modules()
        if type(module) is nn.Linear
        and id(module) not in of_routers
        and id(module.weight) not in left_out
        and min(module.in_features, module.out_features) > _FEW
        and users[id(module.weight)] == 1
    }


def quantise_linear_maps(
    model: nn.Module, format_name: str, dtype: torch.dtype
) -> dict[str, Target]:
    """Put a `QuantisedLinear` in the place of each; targets by name for those without memory.

    `dtype`: the model's.
    """
    targets: dict[str, Target] = {}
    for path, linear in linear_maps(model).items():
        new = QuantisedLinear(format_name, linear, dtype)
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)
        if not linear.weight.is_meta:
            new.quantised.put(lambda tensor: tensor, linear.weight.data)
            continue
        weight = linear.weight.data
        target = PassedOn(weight, tuple(weight.shape), weight=new.quantised)
        targets[f"{path}.weight"] = target
    return targets
