"""Entropy, ratio and mass by hand, token by token; the dials of all rules; what they train."""

from __future__ import annotations

import math

import pytest
import torch

from gemoe_ds.evaluation.untrained import is_rule
from gemoe_ds.moe.router import Router
from tests.routers.cases import make_router, ragged_tokens

RULES = [name for name in Router.names() if is_rule(make_router(name, {}))]


def entropy(best, scores_E, shift):
    bits = -sum(p * math.log2(p) for p in scores_E)
    return round(1.2 * bits + shift)


def ratio(best, scores_E, share):
    return sum(p >= share * best[0] for p in best)


def mass(best, scores_E, share):
    return next(
        (k for k in range(len(best) + 1) if sum(best[:k]) >= share * sum(best) - 1e-7), len(best)
    )


@pytest.mark.parametrize(
    "rule, values",
    [(entropy, (-2.0, 0.1, 9.0)), (ratio, (0.0, 0.4, 0.8)), (mass, (0.3, 0.7, 0.95))],
)
@pytest.mark.parametrize("k_low, k_high", [(0, None), (1, None), (2, 6)])
def test_every_token_by_hand(rule, values, k_low, k_high):
    name = rule.__name__
    for value in values:
        dial = Router.named(name).dial
        router = make_router(name, {dial: value, "k_low": k_low, "k_high": k_high})
        x_TD, ctx = ragged_tokens(seed=3)
        decision, logits_TE = router.decide(ctx.without_padding(x_TD * 2), ctx)
        for t, scores_E in enumerate(logits_TE.softmax(-1).tolist()):
            best = sorted(scores_E, reverse=True)[: k_high or 4]
            k = min(max(rule(best, scores_E, value), k_low), k_high or 4)
            chosen = [scores_E[e] for e in decision.mask_TE[t].nonzero().flatten().tolist()]
            assert sorted(chosen, reverse=True) == (best[:k] if ctx.is_valid_T[t] else [])


@pytest.mark.parametrize("name", RULES)
def test_ends_of_the_dial(name):
    """The smallest k of every token at one end, the largest at the other."""
    router = make_router(name, {})
    x_TD, ctx = ragged_tokens(seed=4)
    found = []
    for value in router.dial_ends:
        setattr(router, router.dial, value)
        k_T = router.decide(x_TD, ctx)[0].mask_TE.sum(1)[ctx.is_valid_T]
        found.append(set(k_T.tolist()))
    assert found == [{router.min_k}, {router.max_k}]


@pytest.mark.parametrize("name", RULES)
def test_gradients_reach_the_gate_alone(name):
    router = make_router(name, {"k_low": 2})
    x_TD, ctx = ragged_tokens(seed=5)
    decision, _ = router.decide(x_TD, ctx)
    (decision.weights_TE * decision.mask_TE).square().sum().backward()
    assert [n for n, _ in router.named_parameters()] == ["gate.weight"]
    assert torch.isfinite(router.gate.weight.grad).all() and router.gate.weight.grad.any()
