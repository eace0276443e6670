"""MoE++ by hand: free experts, gating residual, heterogeneous balance."""

from __future__ import annotations

import math

import pytest
import torch

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.experts.zero_computation import ZeroComputationExperts
from gemoe_ds.moe.router import RoutingSpec
from tests.routers.cases import at_slot, make_context, make_router

SPEC = RoutingSpec(d_model=4, num_experts=3, top_k=2, norm_topk_prob=False)
ONE_EACH = {"zero": 1, "copies": 1, "constant": 1}


def routed(probabilities, **options):
    p_TN = torch.tensor(probabilities)
    router = make_router("moepp", ONE_EACH | options, SPEC)
    ctx = make_context(torch.ones(1, len(p_TN), dtype=torch.bool))
    x_TD = torch.randn(len(p_TN), 4)
    return router, ctx, x_TD, router.select(p_TN.log(), x_TD, ctx)


ZERO_AND_COPY = [[0.1, 0.05, 0.05, 0.3, 0.4, 0.1]]


def test_zero_and_copy_renormalised_give_the_input_back():
    router, _, x_TD, decision = routed(ZERO_AND_COPY, norm_topk_prob="sum")
    torch.testing.assert_close(router.free_output(x_TD, decision), x_TD)
    assert router.plan(decision).token_ids_A.numel() == 0


def test_raw_scores_weigh_the_copy():
    router, _, x_TD, decision = routed(ZERO_AND_COPY)
    torch.testing.assert_close(router.free_output(x_TD, decision), 0.4 * x_TD)


@pytest.mark.parametrize("seed", range(3))
def test_free_experts_equal_their_definition(seed):
    torch.manual_seed(seed)
    free = ZeroComputationExperts(["zero", "copy", "constant", "copy", "constant"], 6).double()
    x_TD = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    weights_TM = torch.rand(7, 5, dtype=torch.float64, requires_grad=True)
    mask_TM = torch.rand(7, 5) < 0.5
    leaves = [x_TD, weights_TM, free.mix_CD2, free.vector_CD]
    expected = torch.zeros(7, 6, dtype=torch.float64)
    for t in range(7):
        outputs = [torch.zeros(6), x_TD[t], None, x_TD[t], None]
        for c, m in enumerate((2, 4)):
            a = (x_TD[t] @ free.mix_CD2[c]).softmax(0)
            outputs[m] = a[0] * x_TD[t] + a[1] * free.vector_CD[c]
        for m in range(5):
            if mask_TM[t, m]:
                expected[t] = expected[t] + weights_TM[t, m] * outputs[m]
    got = free(x_TD, mask_TM, weights_TM)
    torch.testing.assert_close(got, expected)
    probe = torch.randn_like(got)
    for have, want in zip(
        torch.autograd.grad((got * probe).sum(), leaves),
        torch.autograd.grad((expected * probe).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(have, want)


def test_heterogeneous_balance():
    """sum eta f P: one token, f = 1 for its two choices, zero (eta 0.75) and copy (0.75)."""
    router, ctx, _, decision = routed(ZERO_AND_COPY)
    term = router.losses(decision, decision.scores_TE.log(), ctx)["load_balance"]
    assert math.isclose(term.value.item(), 0.75 * (0.3 + 0.4), rel_tol=1e-5)
    assert term.weight == 0.01


def test_gating_residual_adds_the_logits_of_the_layer_before():
    router = make_router("moepp", ONE_EACH, at_slot(SPEC, 1))
    assert make_router("moepp", ONE_EACH, SPEC).residual is None, "the first layer has none before"
    ctx = make_context(torch.ones(1, 5, dtype=torch.bool), layers=2)
    before, x_TD = torch.randn(5, 6), torch.randn(5, 4)
    ctx.layers[0].logits_TE = before
    plain = torch.cat([x_TD @ router.gate.weight.t(), x_TD @ router.free_gate.weight.t()], 1)
    torch.testing.assert_close(router.score(x_TD, ctx), plain)  # starts at zero
    with torch.no_grad():
        router.residual.weight.copy_(torch.randn(6, 6))
    torch.testing.assert_close(router.score(x_TD, ctx), plain + before @ router.residual.weight.t())


def test_no_free_expert_is_refused():
    with pytest.raises(ConfigError, match="use top_k instead"):
        make_router("moepp", {"zero": 0, "copies": 0, "constant": 0}, SPEC)
