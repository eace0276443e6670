"""Top-P by hand: the expert that crosses the threshold is in."""

from __future__ import annotations

import math

import pytest
import torch

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.router import RoutingSpec
from gemoe_ds.moe.step_context import StepContext
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


@pytest.mark.parametrize("learn", ["layer", "token"])
@pytest.mark.parametrize("start_k, max_k", [(2.0, None), (3.5, None), (3.5, 5)])
def test_a_learned_threshold_starts_at_a_mean_k(learn, start_k, max_k):
    spec = RoutingSpec(8, 16, 4, False)
    options = {"learn": learn, "start_k": start_k, "max_k": max_k}
    router = make_router("top_p", options, spec).train()
    x_TD = torch.randn(600, 8) * 3
    valid = torch.arange(600)[None] % 4 > 0
    x_TD[~valid[0]] *= 100  # padding is surer than the rest, and does not count
    ctx = make_context(valid)

    def train_one_step(step):
        k_T = router(x_TD, ctx).token_ids_A.bincount(minlength=600)
        counts = {n: t.double() for n, t in ctx.layers[0].step_counts.items()}
        router.after_step(StepContext(step, 10, counts, counts, assign_, None, None))
        return k_T[valid[0]].float().mean().item()

    assert abs(train_one_step(1) - start_k) > 0.3, "p = 0.4 is another k"
    assert train_one_step(2) == pytest.approx(start_k, rel=0.02)
    with torch.no_grad():
        router.threshold.bias.add_(0.5)
    train_one_step(3)
    assert train_one_step(4) > start_k * 1.02, "from then on it is learned"


def assign_(parameter, value):
    with torch.no_grad():
        parameter.copy_(value)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"start_k": 3.0}, "set learn=layer or learn=token too"),
        ({"start_k": 4.0, "learn": "layer"}, "start_k=4 must be below the largest k, 4"),
        ({"start_k": 2.0, "learn": "token", "max_k": 2}, "must be below the largest k, 2"),
    ],
)
def test_an_impossible_start_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        make_router("top_p", options, SPEC)
