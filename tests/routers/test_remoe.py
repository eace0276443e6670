"""ReMoE by hand: ReLU weights, the load-balancing L1, the controller."""

from __future__ import annotations

import math

import pytest
import torch

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe import losses
from gemoe_ds.moe.router import RoutingSpec
from gemoe_ds.moe.upkeep import Upkeep
from tests.routers.cases import make_context, make_router

SPEC = RoutingSpec(d_model=4, num_experts=4, top_k=2, renormalise=False)


def routed(logits, **options):
    z_TE = torch.tensor(logits)
    router = make_router("remoe", options, SPEC)
    ctx = make_context(torch.ones(1, len(z_TE), dtype=torch.bool))
    return router, ctx, router.select(z_TE, torch.randn(len(z_TE), 4), ctx)


def test_logits_themselves():
    _, _, decision = routed([[1.0, -2.0, 0.5, 0.0], [-1.0, -1, -1, -1]], activation="logits")
    assert decision.mask_TE.tolist() == [[True, False, True, False], [False] * 4]
    assert decision.weights_TE[0].tolist() == [1.0, 0.0, 0.5, 0.0]


def test_scores_above_an_equal_share():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    _, _, decision = routed(p.log().tolist())
    assert decision.mask_TE.tolist() == [[True, True, False, False]]  # theta starts at 1/4
    torch.testing.assert_close(decision.weights_TE[0, :2], torch.tensor([0.25, 0.05]))


def test_regulariser_is_the_switch_loss_of_its_weights():
    """facts: the same algebra with R in place of p, times the mean k over the target."""
    torch.manual_seed(0)
    router, ctx, decision = routed(torch.randn(9, 4).tolist(), activation="logits")
    value = router.losses(decision, decision.scores_TE, ctx)["sparsity"].value / router.coefficient
    mean_k = decision.mask_TE.sum() / 9
    expected = losses.load_balance(decision.weights_TE, decision.mask_TE, ctx.is_valid_T) * mean_k
    torch.testing.assert_close(value, expected / 2)


@pytest.mark.parametrize("active, factor", [(21, 1.2), (19, 1 / 1.2)])
def test_controller_looks_at_all_layers(active, factor):
    router = make_router("remoe", {}, SPEC)  # target: mean k = 2
    model = {"active": torch.tensor(float(active)), "tokens": torch.tensor(10.0)}
    before = router.coefficient.item()
    router.after_step(Upkeep(1, 10, {"active": torch.tensor(99.0)}, model, None, None, None))
    assert math.isclose(router.coefficient.item(), before * factor, rel_tol=1e-6)


def test_target_above_the_experts_is_refused():
    with pytest.raises(ConfigError, match="target_k=4.0 must be below"):
        make_router("remoe", {"target_k": 4.0}, SPEC)


def test_a_small_gain_does_not_meet_the_regulariser():
    router, ctx, decision = routed([[1.0, -2.0, 0.5, 0.0]])
    value = router.losses(decision, decision.scores_TE, ctx)["sparsity"].value
    grads = torch.autograd.grad(
        value, [router.shift.log_theta, router.shift.log_gain], allow_unused=True
    )
    assert grads[0].item() < 0 and grads[1] is None
