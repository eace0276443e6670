"""The obvious, slow definition of an MoE layer, and problems for it."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from gemoe_ds.moe.dispatch import Dispatcher

RAGGED = {
    "seed": st.integers(0, 2**31),
    "tokens": st.integers(0, 12),
    "experts": st.integers(1, 6),
    "density": st.sampled_from([0.0, 0.2, 0.6, 1.0]),
}


def dense_moe(
    x_TD: Tensor, mask_TE: Tensor, weights_TE: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    y_TD = torch.zeros_like(x_TD)
    for expert in range(mask_TE.shape[1]):
        gate, up = (x_TD @ gate_up_EGD[expert].t()).chunk(2, -1)
        out_TD = (torch.nn.functional.silu(gate) * up) @ down_EDF[expert].t()
        weight_T = weights_TE[:, expert] * mask_TE[:, expert]
        y_TD = y_TD + weight_T[:, None] * out_TD
    return y_TD


def ragged_problem(seed: int, tokens: int, experts: int, density: float, d: int = 8, f: int = 8):
    """Random float64 inputs with leaf gradients: x, mask, weights, gate_up, down."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d, generator=g, dtype=torch.float64)
    mask = torch.rand(tokens, experts, generator=g) < density
    weights = torch.rand(tokens, experts, generator=g, dtype=torch.float64)
    gate_up = torch.randn(experts, 2 * f, d, generator=g, dtype=torch.float64)
    down = torch.randn(experts, d, f, generator=g, dtype=torch.float64)
    return (
        x.requires_grad_(),
        mask,
        weights.requires_grad_(),
        gate_up.requires_grad_(),
        down.requires_grad_(),
    )


def grads_of(loss, leaves):
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, leaves, strict=True)]


def dispatch(dispatcher: Dispatcher, x, mask, weights, experts, shared=None):
    return dispatcher(x, weights, dispatcher.dispatch_preprocess(mask), experts, shared)
