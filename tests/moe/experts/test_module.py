"""Experts as a module: dtypes, and what the optimizer and checkpoints see of them."""

from __future__ import annotations

import torch

from gemoe_ds.moe.dispatch import LocalDispatcher
from gemoe_ds.moe.experts.module import Experts
from gemoe_ds.moe.plan import RoutingPlan
from tests.moe.oracle import dense_moe, dispatch, grads_of, ragged_problem


def test_autocast_multiplies_in_its_dtype():
    x, mask, weights, gate_up, down = ragged_problem(4, 20, 4, 0.5)
    x32, weights32 = x.detach().float().requires_grad_(), weights.detach().float()
    layer = Experts(gate_up.detach().float(), down.detach().float(), trainable=True)
    rounded = [p.detach().bfloat16().double().requires_grad_() for p in (gate_up, down)]
    want = dense_moe(x, mask, weights, *rounded)
    with torch.autocast("cpu", torch.bfloat16):
        got = dispatch(LocalDispatcher(), x32, mask, weights32, layer)
    assert got.dtype == torch.float32
    have = grads_of(got.sum(), [x32, layer.gate_up_EGD, layer.down_EDF])
    for a, b in zip([got, *have], [want, *grads_of(want.sum(), [x, *rounded])], strict=True):
        assert 0 < (a - b).norm() < 0.02 * b.norm(), "bf16 products, no more and no less"


def test_frozen_experts_are_invisible_to_optimizer_and_checkpoint():
    experts = Experts(torch.randn(2, 16, 8), torch.randn(2, 8, 8), trainable=False)
    assert not list(experts.parameters()) and not experts.state_dict()
    x = torch.randn(3, 8, requires_grad=True)
    plan = RoutingPlan.from_mask(torch.eye(3, 2, dtype=torch.bool), torch.ones(3, 2))
    experts(x, plan).sum().backward()
    assert x.grad is not None and experts.gate_up_EGD.grad is None
