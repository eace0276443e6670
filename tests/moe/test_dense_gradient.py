"""DenseMixer's gradient against the formula that works out every expert for every token."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear, silu

import gemoe_ds.routers  # noqa: F401  (registers every router)
from gemoe_ds.moe.layer import MoELayer

SIZES = {"d_model": 16, "d_ff": 8, "num_experts": 6, "top_k": 2}


def made(router: str, seed: int, dense: bool, **options) -> MoELayer:
    torch.manual_seed(seed)
    layer = MoELayer.build(router=router, **SIZES, **options)
    layer.dense_gradient = dense
    return layer


def by_hand(layer: MoELayer, x_TD, valid_T):
    """Straight through: value of the chosen ones, gradient of all to the weights alone."""
    x_TD = x_TD * valid_T[:, None]
    decision, _ = layer.router.decide(x_TD, layer.ctx)
    y_TD = 0
    for expert in range(SIZES["num_experts"]):
        gate, up = linear(x_TD, layer.experts.gate_up_EGD[expert]).chunk(2, -1)
        out_TD = linear(silu(gate) * up, layer.experts.down_EDF[expert])
        weight_T1 = decision.weights_TE[:, expert : expert + 1]
        chosen_T1 = decision.mask_TE[:, expert : expert + 1]
        other_TD = (weight_T1 - weight_T1.detach()) * out_TD.detach()
        y_TD = y_TD + torch.where(chosen_T1, weight_T1 * out_TD, other_TD)
    return y_TD * valid_T[:, None]


@pytest.mark.parametrize("valid", ["all", "some", "none"])
@pytest.mark.parametrize(
    "router, options",
    [
        ("top_k", {}),
        ("top_k", {"norm_topk_prob": True}),
        ("gemoe", {"k_low": 0, "k_high": 5}),
        ("top_p", {"threshold": 0.4}),
    ],
)
def test_every_gradient_is_that_of_the_dense_formula(router, options, valid):
    layer, stock = (made(router, 1, dense, **options) for dense in (True, False))
    x_TD, g_TD = torch.randn(2, 9, 16)
    valid_T = {"all": torch.ones(9), "none": torch.zeros(9)}.get(valid, torch.arange(9) % 3 > 0) > 0
    x_TD.requires_grad_()
    y_TD = layer(x_TD, valid_T)
    assert torch.equal(y_TD, stock(x_TD, valid_T)), "the forward pass is the same"
    inputs = [x_TD, *layer.parameters()]
    have = torch.autograd.grad(y_TD, inputs, g_TD, allow_unused=True)
    want = torch.autograd.grad(by_hand(layer, x_TD, valid_T), inputs, g_TD, allow_unused=True)
    usual = torch.autograd.grad(stock(x_TD, valid_T), stock.router.gate.weight, g_TD)[0]
    for a, b in zip(have, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    assert valid == "none" or not torch.allclose(have[names.index("router.gate.weight")], usual)
