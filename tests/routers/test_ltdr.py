"""LTDR by hand: the tail of the vision tokens, and the balance of the language tokens."""

from __future__ import annotations

import math

import pytest
import torch

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe import losses
from gemoe_ds.moe.router import RoutingSpec
from tests.routers.cases import make_context, make_router

SPEC = RoutingSpec(d_model=4, num_experts=4, top_k=2, norm_topk_prob=False)
FLAT, PEAKED = [0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]


def routed(probabilities, vision, **options):
    """[B, S, E] scores and [B, S] kinds."""
    p = torch.tensor(probabilities)
    router = make_router("ltdr", {"tail_k": 4} | options, SPEC)
    vision = torch.tensor(vision, dtype=torch.bool)
    ctx = make_context(torch.ones_like(vision), vision)
    return router, ctx, router.select(p.flatten(0, 1).log(), torch.randn(vision.numel(), 4), ctx)


def test_equal_scores_have_no_tail():
    _, _, decision = routed([[[0.4, 0.3, 0.2, 0.1]] * 7], [[1] * 7])
    assert decision.mask_TE.sum(1).tolist() == [2] * 7


def test_thirteen_percent_of_tail_tokens_give_two_and_a_quarter():
    """facts: k 2, a 4, 13 % tail -> mean k 2.26."""
    _, _, decision = routed([[PEAKED] * 13 + [FLAT] * 87], [[1] * 100])
    assert math.isclose(decision.mask_TE.sum().item() / 100, 2.26)


def test_language_is_never_tail_and_samples_are_apart():
    """The first sample has no peaked token among flat ones; the peaked text token stays at k."""
    mild = [0.4, 0.2, 0.2, 0.2]
    scores = [[FLAT, mild, PEAKED], [mild, PEAKED, mild]]
    vision = [[1, 1, 0], [1, 1, 1]]
    for over, k in (("sample", [2, 4, 2, 2, 4, 2]), ("batch", [2, 2, 2, 2, 4, 2])):
        _, _, decision = routed(scores, vision, mean_over=over)
        assert decision.mask_TE.sum(1).tolist() == k, over


@pytest.mark.parametrize("over, tokens", [("language", slice(2, 3)), ("all", slice(0, 3))])
def test_balance_counts_language_only(over, tokens):
    scores = [[FLAT, [0.4, 0.3, 0.2, 0.1], PEAKED]]
    router, ctx, decision = routed(scores, [[1, 1, 0]], balance_over=over)
    value = router.losses(decision, decision.scores_TE.log(), ctx)["load_balance"].value
    counted = torch.zeros(3, dtype=torch.bool)
    counted[tokens] = True
    expected = losses.load_balance(decision.scores_TE, decision.mask_TE, counted)
    torch.testing.assert_close(value, expected)


def test_weights_as_printed_and_as_meant():
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    for how, expected in (
        ("softmax_p", p[:2].softmax(0)),
        ("sum", p[:2] / 0.7),
        ("backbone", p[:2]),
    ):
        _, _, decision = routed([[p.tolist()]], [[0]], norm_topk_prob=how)
        torch.testing.assert_close(decision.weights_TE[0, :2], expected)


def test_default_tail_is_half_as_many_again():
    assert make_router("ltdr", {}, RoutingSpec(4, 64, 8, False)).tail_k == 12


def test_a_tail_with_fewer_experts_is_refused():
    with pytest.raises(ConfigError, match="k <= tail_k"):
        make_router("ltdr", {"tail_k": 1}, SPEC)


def test_padding_is_no_vision():
    """Its variance, the largest, would raise the mean above that of the second token."""
    scores = torch.tensor([FLAT, [0.4, 0.2, 0.2, 0.2], PEAKED])
    router = make_router("ltdr", {"tail_k": 4}, SPEC)
    ctx = make_context(torch.tensor([[True, True, False]]), torch.ones(1, 3, dtype=torch.bool))
    assert router.is_tail(scores, ctx).tolist() == [False, True, False]
