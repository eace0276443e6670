"""Weights of experts in the forms that products take."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from gemoe_ds.moe.experts import by_expert, ffn, onednn, weights
from gemoe_ds.moe.experts.module import Experts
from gemoe_ds.moe.experts.weights import ExpertWeights, PackedExpertWeights
from gemoe_ds.moe.plan import RoutingPlan
from tests.moe.oracle import dense_moe, grads_of, ragged_problem


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN multiplies no bfloat16 here"
)
@patch.object(ffn, "path_for", lambda *_: by_expert)
def test_packed_weights_follow_the_module():
    """Packed copies are of no use once the weights are others, or have another dtype."""
    x, mask, weights, gate_up, down = ragged_problem(5, 20, 4, 0.5, d=16)
    x16, weights32 = x.detach().bfloat16(), weights.detach().float()
    plan = RoutingPlan.from_mask(mask, weights32)
    experts = Experts(gate_up.detach().bfloat16(), down.detach().bfloat16(), trainable=False)
    first = experts(x16, plan)
    assert isinstance(experts._packed, PackedExpertWeights)
    experts.gate_up_EGD = -experts.gate_up_EGD  # silu(-gate) * -up: something else
    second = experts(x16, plan)
    plain = Experts(experts.gate_up_EGD, experts.down_EDF, trainable=False, pack=False)
    torch.testing.assert_close(second, plain(x16, plan), rtol=0.05, atol=0.5)
    assert (first - second).norm() > 0.1 * first.norm()
    torch.testing.assert_close(
        experts.float()(x.detach().float(), plan), plain.float()(x.detach().float(), plan)
    )


@pytest.mark.parametrize("rows", [1, 3, 4, 16, 40], ids="{} rows".format)
@patch.object(ffn, "path_for", lambda *_: by_expert)
@patch.object(weights, "SMALL_FFN", 0)
@patch.object(onednn, "multiplies_slowly", lambda device, dtype: dtype == torch.bfloat16)
def test_without_instructions_bfloat16_is_multiplied_in_float32(rows):
    """In both directions nearer to the dense sum in float64 than bfloat16's own rounding, but for
    a row or two that are written; float32 rows of narrow weights are never rounded."""
    x, mask, weights_TE, gate_up, down = ragged_problem(6, rows, 4, 0.9, d=16, f=24)
    x, gate_up, down = (t.detach().bfloat16() for t in (x, gate_up, down))
    wide = [t.double().requires_grad_() for t in (x, weights_TE.detach())]
    want = dense_moe(wide[0], mask, wide[1], gate_up.double(), down.double())
    experts = Experts(gate_up, down, trainable=False, pack=False)
    assert experts._expert_weights(torch.bfloat16).dtype == torch.float32
    leaves = [x.clone().requires_grad_(), weights_TE.detach().float().requires_grad_()]
    plan = RoutingPlan.from_mask(mask, leaves[1])
    got = experts(leaves[0], plan)
    assert got.dtype == torch.bfloat16
    bound = 0.004  # half a unit in the last place of what comes out
    assert (got - want).norm() <= bound * want.norm()
    grads = grads_of(got.float().sum(), leaves)
    for one, other in zip(grads, grads_of(want.sum(), wide), strict=True):
        assert (one - other).norm() <= bound * other.norm()
    with torch.no_grad():
        few = experts(x, plan)
        exact = experts(x.float(), plan)
    assert (few - want).norm() <= (0.02 if rows < 4 else bound) * want.norm()
    assert (exact - want).norm() <= 1e-5 * want.norm()


@patch.object(weights, "SMALL_FFN", 0)
def test_other_dtypes_are_multiplied_as_they_are():
    _, _, _, gate_up, down = ragged_problem(6, 3, 4, 0.9, d=16, f=24)
    for dtype in (torch.float32, torch.float64):
        found = ExpertWeights(gate_up, down, dtype)
        assert (found.dtype, found.narrow) == (dtype, None)
