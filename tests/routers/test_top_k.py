"""Static top-k: the baseline's choices and weights."""

from __future__ import annotations

import pytest
import torch

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.context import TokenContext
from gemoe_ds.moe.router import RoutingSpec
from gemoe_ds.routers.top_k import TopKRouter
from tests.routers.cases import make_context, make_router


def make(norm_topk_prob=False, **options):
    torch.manual_seed(0)
    spec = RoutingSpec(d_model=6, num_experts=5, top_k=2, norm_topk_prob=norm_topk_prob)
    router = TopKRouter(TopKRouter.Config(**options), spec)
    ctx = TokenContext(1)
    ctx.begin(torch.ones(1, 7, dtype=torch.bool), torch.zeros(1, 7, dtype=torch.bool))
    return router, ctx


@pytest.mark.parametrize("k, expected", [(None, 2), (1, 1), (5, 5)])
def test_every_token_gets_its_k_best_with_raw_scores(k, expected):
    router, ctx = make(k=k)
    x = torch.randn(7, 6)
    scores = (x @ router.gate.weight.t()).softmax(-1)
    plan = router(x, ctx)
    best = scores.topk(expected).values.sum(-1)
    got = torch.zeros(7).index_add(0, plan.token_ids_A, plan.weights_A.detach())
    torch.testing.assert_close(got, best)
    assert plan.tokens_per_expert_E.sum() == 7 * expected


def test_renormalises_where_the_backbone_does():
    router, ctx = make(norm_topk_prob=True)
    plan = router(torch.randn(7, 6), ctx)
    got = torch.zeros(7).index_add(0, plan.token_ids_A, plan.weights_A.detach())
    torch.testing.assert_close(got, torch.ones(7))


def test_more_experts_than_there_are():
    with pytest.raises(ConfigError, match=r"model.router.k=6 exceeds the backbone's 5 experts"):
        make(k=6)


def test_routing_is_float32_for_bfloat16_activations():
    router, ctx = make()
    x = torch.randn(7, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        plan = router(x, ctx)
    assert router.gate.weight.dtype == torch.float32
    assert plan.weights_A.dtype == torch.float32
    assert ctx.layers[0].logits_TE.dtype == torch.float32


@pytest.mark.parametrize("target, excess", [(0.0, 2.0), (1.5, 0.5), (3.0, 0.0)])
def test_entropy_above_its_target_costs(target, excess):
    """Equal scores of four experts: 2 bits."""
    spec = RoutingSpec(d_model=4, num_experts=4, top_k=2, norm_topk_prob=False)
    router = make_router("top_k", {"entropy_weight": 0.1, "entropy_target": target}, spec)
    ctx, logits_TE = make_context(torch.ones(1, 3, dtype=torch.bool)), torch.zeros(3, 4)
    decision = router.select(logits_TE, torch.zeros(3, 4), ctx)
    found = router.losses(decision, logits_TE, ctx)["entropy"]
    assert found.value.item() == pytest.approx(excess, abs=1e-5) and found.weight == 0.1
