"""Score by hand: token by token, the experts whose score passes the threshold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.routers.cases import SPEC, make_context, make_router, ragged_tokens


def by_hand(scores_E, threshold, k_low, k_high, share):
    """The experts of one token, a set."""
    best = sorted(range(len(scores_E)), key=lambda e: -scores_E[e])[:k_high]
    total = sum(scores_E[e] for e in best) if share else 1.0
    return {e for rank, e in enumerate(best) if rank < k_low or scores_E[e] / total >= threshold}


@pytest.mark.parametrize("renormalises", [False, True])
@pytest.mark.parametrize("k_low, k_high", [(0, None), (1, None), (2, 6)])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.2, 1.0])
def test_every_token_by_hand(renormalises, k_low, k_high, threshold):
    spec = replace(SPEC, norm_topk_prob=renormalises)
    options = {"threshold": threshold, "k_low": k_low, "k_high": k_high}
    router = make_router("score", options, spec)
    x_TD, ctx = ragged_tokens(seed=1)
    decision, logits_TE = router.decide(ctx.without_padding(x_TD * 2), ctx)
    for t, scores_E in enumerate(logits_TE.softmax(-1).tolist()):
        expected = by_hand(scores_E, threshold, k_low, k_high or 4, renormalises)
        chosen = set(decision.mask_TE[t].nonzero().flatten().tolist())
        assert chosen == (expected if ctx.is_valid_T[t] else set())
        total = sum(scores_E[e] for e in chosen) if renormalises else 1.0
        for e in chosen:
            assert decision.weights_TE[t, e].item() == pytest.approx(scores_E[e] / total)


@pytest.mark.parametrize("share, k", [("backbone", 4), ("no", 4), ("yes", 2)])
def test_what_is_compared_can_be_said(share, k):
    """Shares of 0.2 * (1.5, 1.5, 1, 1) are 0.3, 0.3, 0.2, 0.2."""
    router = make_router("score", {"threshold": 0.19, "share": share}, SPEC)
    scores_TE = torch.tensor([[0.3, 0.3, 0.2, 0.2 - 4e-3, 1e-3, 1e-3, 1e-3, 1e-3]])
    if share == "yes":
        scores_TE = torch.tensor([[0.3, 0.3, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05]])
    ctx = make_context(torch.ones(1, 1, dtype=torch.bool))
    decision = router.select(scores_TE.log(), torch.randn(1, 16), ctx)
    assert decision.mask_TE.sum().item() == k
