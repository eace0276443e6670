"""ReMoE by hand: ReLU weights, the load-balancing L1, the controller."""

from __future__ import annotations

import math

import pytest
import torch

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe import losses
from gemoe_ds.moe.router import RoutingSpec
from gemoe_ds.moe.step_context import StepContext
from tests.routers.cases import make_context, make_router

SPEC = RoutingSpec(d_model=4, num_experts=4, top_k=2, norm_topk_prob=False)


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
    router.after_step(StepContext(1, 10, {"active": torch.tensor(99.0)}, model, None, None, None))
    assert math.isclose(router.coefficient.item(), before * factor, rel_tol=1e-6)


def run_loop(start_theta, steps, *, task=0.1, **options):
    """Mean k of every step, of a router that gets both losses; the task wants every expert."""
    spec = RoutingSpec(d_model=16, num_experts=8, top_k=3, norm_topk_prob=False)
    router = make_router("remoe", {"coefficient": 0.01, "factor": 1.02} | options, spec).train()
    with torch.no_grad():
        router.shift.log_theta.fill_(math.log(start_theta))
    learned = [router.shift.log_theta]  # what else there is would serve the task without more k
    optimizer = torch.optim.Adam(learned, lr=2e-2)
    x_TD = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    ctx = make_context(torch.ones(1, 64, dtype=torch.bool))
    means = []
    for step in range(1, steps + 1):
        plan = router(x_TD, ctx)
        means.append(plan.token_ids_A.numel() / 64)
        loss = ctx.layers[0].losses["sparsity"].value - task * plan.weights_A.sum() / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sums = {n: t.double() for n, t in ctx.layers[0].step_counts.items()}
        router.after_step(StepContext(step, steps, sums, sums, None, None, None))
    return means, router


@pytest.mark.parametrize("start_theta, start", [(0.01, "above"), (0.5, "below")])
def test_the_loop_comes_to_its_target(start_theta, start):
    """From above by the regulariser; from below by the task, which the regulariser then stops."""
    means, _ = run_loop(start_theta, 700)
    assert means[0] > 7 if start == "above" else means[0] < 0.5
    assert sum(means[-300:]) / 300 == pytest.approx(3, rel=0.15)
    swing = [max(part) - min(part) for part in (means[100:400], means[-200:])]
    assert swing[1] < 2.5 and swing[1] < swing[0], "it swings about the target, less and less"


def test_below_its_target_nothing_but_the_task_raises_k():
    """The coefficient goes to its lower bound and waits there."""
    means, router = run_loop(0.2, 200, task=0.0, factor=1.2)
    assert means[-1] <= means[0] < 3
    assert router.coefficient.item() == pytest.approx(1e-10)


@pytest.mark.parametrize("mean_k, other, bound", [(1.0, 3.9, 1e-10), (3.9, 1.0, 100.0)])
def test_the_coefficient_is_never_lost(mean_k, other, bound):
    """After thousands of steps on one side it is at its bound, and as soon as it may it leaves."""
    router = make_router("remoe", {}, SPEC)

    def steps(number, k):
        model = {"active": torch.tensor(10 * k), "tokens": torch.tensor(10.0)}
        for _ in range(number):
            router.after_step(StepContext(1, 10, model, model, None, None, None))
        return router.coefficient.item()

    assert steps(5000, mean_k) == pytest.approx(bound)
    farther = steps(1, mean_k), steps(60, other)
    assert farther[0] == pytest.approx(bound)
    assert farther[1] == pytest.approx(bound * (1.2**60 if other > 2 else 1.2**-60), rel=1e-3)


def test_a_coefficient_outside_of_its_range_is_refused():
    with pytest.raises(ConfigError, match="coefficient=200 must be within coefficient_range="):
        make_router("remoe", {"coefficient": 200.0}, SPEC)


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
