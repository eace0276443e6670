"""Alloc-MoE by hand: the best scores of all tokens of a forward, as many as the budget allows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.routers.cases import SPEC, make_router, ragged_tokens


def by_hand(scores_TE, valid_T, k, k_low, k_high, share):
    """How many experts every token gets."""
    got, waiting = [], []
    for t, (scores_E, valid) in enumerate(zip(scores_TE, valid_T, strict=True)):
        best = sorted(scores_E, reverse=True)[:k_high]
        total = sum(best) if share else 1.0
        got.append(k_low if valid else 0)
        waiting += [(s / total, t) for s in best[k_low:] if valid]
    budget = round((min(k, k_high) - k_low) * sum(valid_T))
    for _, t in sorted(waiting, reverse=True)[: max(budget, 0)]:
        got[t] += 1
    return got


@pytest.mark.parametrize("renormalises", [False, True])
@pytest.mark.parametrize("k_low, k_high", [(0, None), (1, None), (2, 6)])
@pytest.mark.parametrize("k", [0.5, 2.0, 3.3, 9.0])
def test_the_budget_is_spent_on_the_best_scores(renormalises, k_low, k_high, k):
    options = {"k": k, "k_low": k_low, "k_high": k_high}
    router = make_router("alloc_moe", options, replace(SPEC, norm_topk_prob=renormalises))
    x_TD, ctx = ragged_tokens(seed=2)
    decision, logits_TE = router.decide(ctx.without_padding(x_TD * 2), ctx)
    expected = by_hand(
        logits_TE.softmax(-1).tolist(), ctx.is_valid_T.tolist(), k, k_low, k_high or 4, renormalises
    )
    assert decision.mask_TE.sum(1).tolist() == expected
    assert any(expected) and decision.scores_TE[decision.mask_TE].numel() == sum(expected)
