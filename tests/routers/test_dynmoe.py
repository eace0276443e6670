"""DynMoE by hand: thresholds, straight-through gradients, closing and opening experts."""

from __future__ import annotations

import math

import pytest
import torch

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.router import RoutingSpec
from gemoe_ds.moe.step_context import StepContext
from gemoe_ds.routers.dynmoe import balance_and_efficiency
from tests.routers.cases import make_context, make_router

SPEC = RoutingSpec(d_model=3, num_experts=3, top_k=1, norm_topk_prob=False)
PAPER = {"start_k": "half"}


def made(tokens, **options):
    router = make_router("dynmoe", PAPER | options, SPEC).train()
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(3))  # similarity with an axis
    x_TD = torch.tensor(tokens)
    return router, x_TD, make_context(torch.ones(1, len(tokens), dtype=torch.bool))


def assign_(parameter, value):
    with torch.no_grad():
        parameter.copy_(value)


def after_step(router, ctx, step=1):
    layer = {n: t.double() for n, t in ctx.layers[0].step_counts.items()}
    router.after_step(StepContext(step, 10, layer, layer, assign_, lambda p: p.detach(), None))


def test_experts_with_a_positive_similarity_share_the_token():
    router, x_TD, ctx = made([[1.0, 2.0, -1.0], [-1.0, -1.0, 1.0], [-1.0, -2.0, -3.0]])
    plan = router(x_TD, ctx)
    assert plan.token_ids_A.tolist() == [0, 0, 1]
    assert plan.tokens_per_expert_E.tolist() == [1, 1, 1]
    torch.testing.assert_close(plan.weights_A.detach(), torch.tensor([0.5, 0.5, 1.0]))


def test_at_inference_the_best_one_takes_what_nobody_wants():
    router, x_TD, ctx = made([[-1.0, -2.0, -3.0]])
    assert router(x_TD, ctx).token_ids_A.numel() == 0
    plan = router.eval()(x_TD, ctx)
    assert plan.tokens_per_expert_E.tolist() == [1, 0, 0]
    assert plan.weights_A.tolist() == [1.0]


def test_half_of_the_experts_at_first():
    spec = RoutingSpec(64, 64, 8, False)
    router = make_router("dynmoe", PAPER, spec).train()
    ctx = make_context(torch.ones(1, 500, dtype=torch.bool))
    mean_k = router(torch.randn(500, 64), ctx).token_ids_A.numel() / 500
    assert 30 < mean_k < 34


def test_start_k_is_reached_after_the_first_step():
    """By one threshold for all experts: those that are liked more are used more."""
    spec = RoutingSpec(64, 64, 8, False)
    router = make_router("dynmoe", {}, spec).train()
    ctx = make_context(torch.arange(500)[None] < 400)
    x_TD = torch.randn(500, 64) + router.gate.weight[3] / router.gate.weight[3].norm()
    x_TD[400:] = router.gate.weight[5]  # padding
    router(x_TD, ctx)
    after_step(router, ctx)
    plan = router(x_TD, ctx)
    assert math.isclose(plan.token_ids_A.numel() / 400, 8, rel_tol=0.02)
    assert router.threshold.value_E.unique().numel() == 1
    assert plan.tokens_per_expert_E[3] > 64


def test_gradient_reaches_chosen_experts_only():
    """The weight moves with the margin by 1/k for chosen ones, as if sign were linear."""
    router, x_TD, ctx = made([[1.0, 2.0, -1.0]], temperature=1.0)
    router(x_TD, ctx).weights_A.sum().backward()
    slope = -torch.tensor(0.25)  # of sigmoid at G = 0
    torch.testing.assert_close(
        router.threshold.value_E.grad, torch.tensor([slope / 2, slope / 2, 0.0])
    )
    assert not router.gate.weight.grad[2].any() and router.gate.weight.grad[:2].any()


def test_losses_by_hand():
    router, x_TD, ctx = made([[1.0, 2.0, -1.0]])
    with torch.no_grad():
        router.gate.weight.copy_(torch.tensor([[2.0, 0, 0], [1, 1, 0], [0, 0, 3]]))
    router(x_TD, ctx)
    terms = ctx.layers[0].losses
    # unit rows have one inner product, 1/sqrt 2, twice in the matrix
    assert math.isclose(terms["diversity"].value.item(), 1.0, rel_tol=1e-5)
    mean_length = (2 + math.sqrt(2) + 3) / 3
    assert math.isclose(terms["simplicity"].value.item(), mean_length, rel_tol=1e-5)


def released_losses(gates, valid):
    """The load balance and the "efficiency" of the released code, token by token."""
    rows = [row for row, is_valid in zip(gates, valid, strict=True) if is_valid]
    served = [[g / sum(row) for g in row] for row in rows if sum(row) > 0]
    num_experts = len(gates[0])
    mean = [sum(column) / len(served) for column in zip(*served, strict=True)] if served else []
    chosen = [row for row in rows if sum(row) > 0]
    share = [sum(column) / len(served) for column in zip(*chosen, strict=True)]
    balance = num_experts * sum(m * c for m, c in zip(mean, share, strict=True))
    return balance, sum(map(sum, rows)) / max(1, len(rows) * num_experts)


@pytest.mark.parametrize("seed", range(6))
def test_load_balance_and_efficiency_are_the_released_ones(seed):
    """Ragged: padding, tokens and whole batches without experts, experts without tokens."""
    torch.manual_seed(seed)
    tokens, num_experts = 1 + 3 * seed, 5
    valid_T = torch.rand(tokens) < 0.8
    mask_TE = (torch.rand(tokens, num_experts) < [0.0, 0.2, 0.5][seed % 3]) & valid_T[:, None]
    mask_TE[:, 1] = False
    balance, efficiency = balance_and_efficiency(mask_TE.float(), mask_TE, valid_T)
    expected = released_losses(mask_TE.long().tolist(), valid_T.tolist())
    assert (balance.item(), efficiency.item()) == pytest.approx(expected)


def test_golden_values_of_the_released_losses():
    """k = 2, 1, 0: gates / k average to 3/4, 1/4, 0 over two tokens, choices to 1, 1/2, 0."""
    router, x_TD, ctx = made([[1.0, 2.0, -1.0], [1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    router(x_TD, ctx)
    terms = ctx.layers[0].losses
    assert terms["load_balance"].value.item() == pytest.approx(3 * (3 / 4 + 1 / 8))
    assert terms["efficiency"].value.item() == pytest.approx(3 / 9)
    assert {term.weight for term in terms.values()} == {0.01}
    # both pull at the thresholds of chosen experts only, the second at every choice alike
    (grad_E,) = torch.autograd.grad(terms["efficiency"].value, router.threshold.value_E)
    torch.testing.assert_close(grad_E, -torch.tensor([2.0, 1.0, 0.0]) * 10 / 4 / 9)


def test_the_load_balance_pulls_as_in_the_released_code():
    """Its gates are divided by their own sum, with gradient; the choices have none."""
    mask_TE = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    gates_TE = mask_TE.double().requires_grad_()
    balance, _ = balance_and_efficiency(gates_TE, mask_TE, torch.ones(3, dtype=torch.bool))
    (grad_TE,) = torch.autograd.grad(balance, gates_TE)
    share = [1.0, 0.5, 0.0]
    expected = torch.zeros(3, 3).double()
    for t, k in ((0, 2), (1, 1)):
        for j in range(3):
            for e in range(3):
                ratio = mask_TE[t, e].item() / k
                expected[t, j] += 3 * share[e] / 2 * ((e == j) - ratio) / k
    torch.testing.assert_close(grad_TE[:2], expected[:2])


def test_idle_experts_close_and_the_first_opens_for_the_unserved():
    """Expert 1 is idle; the third token has no expert: row 1 becomes its direction."""
    tokens = [[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0], [-1.0, -2.0, -2.0]]
    router, x_TD, ctx = made(tokens, adapt="close", adapt_every=2)
    for step in (1, 2):
        router(x_TD, ctx)
        after_step(router, ctx, step)
    assert router.is_open_E.tolist() == [1, 0, 1]
    assert router(
        torch.tensor([[0.1, 5.0, 0.1]]), make_context(torch.ones(1, 1, dtype=torch.bool))
    ).tokens_per_expert_E.tolist() == [1, 0, 1]

    router, x_TD, ctx = made(tokens, adapt="both", adapt_every=1)
    router(x_TD, ctx)
    after_step(router, ctx, 1)
    assert router.is_open_E.tolist() == [1, 1, 1]
    torch.testing.assert_close(router.gate.weight[1].detach(), torch.tensor([-1.0, -2.0, -2.0]) / 3)
    assert 2 in router(x_TD, ctx).token_ids_A.tolist(), "now it has one"


def test_of_two_closed_experts_the_first_opens_and_none_that_is_closed_is_the_best():
    router, x_TD, ctx = made([[-9.0, -1.0, 5.0], [-9.0, -1.0, -2.0]], adapt="both", adapt_every=1)
    with torch.no_grad():
        router.threshold.value_E.fill_(0.25)
    router(x_TD, ctx)
    after_step(router, ctx)
    assert router.is_open_E.tolist() == [1, 0, 1]
    assert router.threshold.value_E.tolist() == [0.0, 0.25, 0.25], "of the new one it starts anew"
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(3))
    assert router.eval()(x_TD[1:], ctx_of(1)).tokens_per_expert_E.tolist() == [0, 0, 1]


def test_padding_is_not_unserved():
    router, x_TD, _ = made([[-1.0, -2.0, -3.0], [-5.0, -5.0, -5.0]], adapt="both")
    ctx = make_context(torch.tensor([[True, False]]))
    router(x_TD, ctx)
    assert ctx.layers[0].step_counts["unserved_D"].tolist() == [-1.0, -2.0, -3.0]


def ctx_of(tokens):
    return make_context(torch.ones(1, tokens, dtype=torch.bool))


def test_one_stays_open_though_nobody_chose_any():
    router, x_TD, ctx = made([[-1.0, -2.0, -3.0]], adapt="close", adapt_every=1)
    router(x_TD, ctx)
    after_step(router, ctx)
    assert router.is_open_E.tolist() == [1, 1, 1]
    assert router.eval()(x_TD, ctx).tokens_per_expert_E.sum() == 1


@pytest.mark.parametrize("start_k", [-1, 0, 3.5])
def test_impossible_start_is_refused(start_k):
    with pytest.raises(ConfigError, match=f"start_k={start_k} must be above 0 and at most .* 3 ex"):
        made([[1.0, 2.0, -1.0]], start_k=start_k)


def test_weights_on_the_backbone_s_scale():
    router, x_TD, ctx = made([[1.0, 2.0, -1.0]], weights="scores")
    plan = router(x_TD, ctx)
    p = torch.tensor([1.0, 2.0, -1.0]).softmax(0)
    torch.testing.assert_close(plan.weights_A.detach(), p[:2])
