"""Weights of experts in the forms that products take."""

from __future__ import annotations

from unittest.mock import patch

import torch

from gemoe_ds.moe.experts import by_expert, ffn
from gemoe_ds.moe.experts.module import Experts
from gemoe_ds.moe.experts.weights import PackedExpertWeights
from gemoe_ds.moe.plan import RoutingPlan
from tests.moe.oracle import ragged_problem


@patch.object(ffn, "path_for", lambda *_: by_expert)
def test_packed_weights_follow_the_module():
    """Packed copies are of no use once the weights are others, or have another dtype."""
    x, mask, weights, gate_up, down = ragged_problem(5, 20, 4, 0.5, d=16)
    x16, weights32 = x.detach().bfloat16(), weights.detach().float()
    plan = RoutingPlan.from_mask(mask, weights32)
    experts = Experts(gate_up.detach().bfloat16(), down.detach().bfloat16(), trainable=False)
    first = experts(x16, plan)
    assert isinstance(experts._packed, PackedExpertWeights), "or this CPU has no bfloat16"
    experts.gate_up_EGD = -experts.gate_up_EGD  # silu(-gate) * -up: something else
    second = experts(x16, plan)
    plain = Experts(experts.gate_up_EGD, experts.down_EDF, trainable=False, pack=False)
    torch.testing.assert_close(second, plain(x16, plan), rtol=0.05, atol=0.5)
    assert (first - second).norm() > 0.1 * first.norm()
    torch.testing.assert_close(
        experts.float()(x.detach().float(), plan), plain.float()(x.detach().float(), plan)
    )
