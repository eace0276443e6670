"""Top-P by hand: the expert that crosses the threshold is in."""

from __future__ import annotations

import math

import pytest
import torch

from gemoe_ds.moe.router import RoutingSpec
from tests.routers.cases import make_context, make_router

SPEC = RoutingSpec(d_model=4, num_experts=4, top_k=2, norm_topk_prob=False)


def routed(probabilities, **options):
    """The decision for tokens whose scores are `probabilities`."""
    p_TE = torch.tensor(probabilities)
    router = make_router("top_p", options, RoutingSpec(4, p_TE.shape[1], 2, False))
    ctx = make_context(torch.ones(1, len(p_TE), dtype=torch.bool))
    return router, ctx, router.select(p_TE.clamp_min(1e-30).log(), torch.randn(len(p_TE), 4), ctx)


def test_uniform_and_certain():
    """facts: 16 equal experts at 0.4 need 7, as 7/16 is the first sum above; a certain one 1."""
    _, _, decision = routed([[1 / 16] * 16, [1.0] + [0.0] * 15])
    assert decision.mask_TE.sum(1).tolist() == [7, 1]


@pytest.mark.parametrize("strict, k", [(True, 3), (False, 2)])
def test_a_sum_that_meets_the_threshold(strict, k):
    _, _, decision = routed([[0.25, 0.25, 0.25, 0.25]], threshold=0.5, strict=strict)
    assert decision.mask_TE.sum(1).tolist() == [k]


def test_chosen_are_the_best_with_their_raw_scores():
    _, _, decision = routed([[0.1, 0.45, 0.3, 0.15]], threshold=0.5)
    assert decision.mask_TE.tolist() == [[False, True, True, False]]
    torch.testing.assert_close(decision.weights_TE[0, 1:3], torch.tensor([0.45, 0.3]))


def test_most_experts():
    _, _, decision = routed([[1 / 16] * 16], max_k=3)
    assert decision.mask_TE.sum() == 3


def test_dynamic_loss_is_the_entropy_in_nats():
    router, ctx, decision = routed([[0.25] * 4, [1.0, 0.0, 0.0, 0.0]])
    terms = router.losses(decision, decision.scores_TE.log(), ctx)
    assert math.isclose(terms["entropy"].value.item(), math.log(4) / 2, rel_tol=1e-5)
    assert terms["entropy"].weight == 1e-4 and terms["load_balance"].weight == 1e-2


@pytest.mark.parametrize("learn", ["layer", "token"])
def test_a_learned_threshold_starts_where_asked_and_hears_the_loss(learn):
    router, _, decision = routed([[0.1, 0.45, 0.3, 0.15]], threshold=0.5, learn=learn)
    torch.testing.assert_close(decision.weights_TE[0, 1:3], torch.tensor([0.45, 0.3]))
    decision.weights_TE[decision.mask_TE].sum().backward()
    assert router.threshold.bias.grad.item() > 0  # more weight, more experts
