"""ZEDA by hand: zero experts within top-k, the balance of two groups, drawn rows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.router import RoutingSpec
from tests.routers.cases import make_context, make_router

SPEC = RoutingSpec(d_model=4, num_experts=4, top_k=2, norm_topk_prob=False)
TOKENS = [
    [0.3, 0.1, 0.05, 0.05, 0.4, 0.1],  # one real, one zero
    [0.1, 0.05, 0.05, 0.1, 0.3, 0.4],  # both zero
    [0.4, 0.3, 0.1, 0.1, 0.05, 0.05],  # both real
]


def routed(probabilities, spec=SPEC, **options):
    p_TN = torch.tensor(probabilities)
    router = make_router("zeda", options, spec)
    ctx = make_context(torch.ones(1, len(p_TN), dtype=torch.bool))
    return router, ctx, router.select(p_TN.log(), torch.randn(len(p_TN), 4), ctx)


def test_half_as_many_zero_experts_take_choices_away():
    router, _, decision = routed(TOKENS)
    assert len(router.free.kinds) == 2 and router.free.all_zero
    assert router.plan(decision).token_ids_A.tolist() == [0, 2, 2]


@pytest.mark.parametrize(
    "how, divides, expected",
    [
        ("all", False, [3 / 7, 4 / 7, 3 / 7]),  # over what was chosen
        ("backbone", True, [3 / 7, 4 / 7, 3 / 7]),  # the code, for a backbone that divides
        ("none", True, [0.3 / 0.5, 0.4 / 0.9, 0.3 / 0.9]),  # softmax over the real ones
        ("backbone", False, [0.3 / 0.5, 0.4 / 0.9, 0.3 / 0.9]),
        ("raw", True, [0.3, 0.4, 0.3]),  # the code, for a backbone that does not
    ],
)
def test_weights(how, divides, expected):
    spec = replace(SPEC, norm_topk_prob=divides)
    router, _, decision = routed(TOKENS, spec, norm_topk_prob=how)
    weights_TE, mask_TE = router.split(decision.weights_TE)[0], router.split(decision.mask_TE)[0]
    torch.testing.assert_close(weights_TE[mask_TE], torch.tensor(expected))


def released(p_TN, mask_TN, num_real, k, w):
    """The released formula, in its own sums over tokens of a batch; without its coefficient."""
    tokens, zeros = len(p_TN), p_TN.shape[1] - num_real
    total = 0.0
    for t in range(tokens):
        for s in range(tokens):
            real = mask_TN[t, :num_real].sum() * p_TN[s, :num_real].sum()
            zero = mask_TN[t, num_real:].sum() * p_TN[s, num_real:].sum()
            total += float(real / num_real + zero / (zeros * w))
    return total * (num_real + w * zeros) / (k * tokens * tokens)


@pytest.mark.parametrize("seed", range(5))
def test_balance_is_the_released_one(seed):
    g = torch.Generator().manual_seed(seed)
    zeros, w = 1 + seed, 0.5 + seed
    p_TN = torch.randn(9, 4 + zeros, generator=g).softmax(-1)
    router, ctx, decision = routed(p_TN.tolist(), zeros=zeros, zero_weight=w)
    value = router.losses(decision, p_TN.log(), ctx)["group_balance"].value
    expected = released(p_TN, decision.mask_TE, 4, 2, w)
    assert math.isclose(value.item(), expected, rel_tol=1e-4)


@pytest.mark.parametrize("w, share", [(2.0, 0.5), (1.0, 1 / 3), (6.0, 0.75)])
def test_balance_rests_at_the_share_that_was_asked_for(w, share):
    """Group scores and choices both at that share: 1, and no gradient from one group to the other.

    With w = 2 and half as many zero experts that is one half: the title's "half experts".
    """
    router, ctx, decision = routed(TOKENS, zero_weight=w)
    p_TN = torch.tensor([[(1 - share) / 4] * 4 + [share / 2] * 2]).repeat(12, 1).requires_grad_()
    mask_TN = torch.zeros(12, 6, dtype=torch.bool)
    mask_TN.view(-1)[[6 * (i % 12) + 4 + i // 12 for i in range(round(24 * share))]] = True
    mask_TN.view(-1)[[6 * (i % 12) + i // 12 for i in range(round(24 * (1 - share)))]] = True
    ctx = make_context(torch.ones(1, 12, dtype=torch.bool))
    decision = replace(decision, scores_TE=p_TN, mask_TE=mask_TN)
    value = router.losses(decision, p_TN.log(), ctx)["group_balance"].value
    assert math.isclose(value.item(), 1, rel_tol=1e-5)
    (grad_TN,) = torch.autograd.grad(value, p_TN)
    torch.testing.assert_close(grad_TN, grad_TN[0, 0].expand_as(grad_TN))


def test_too_few_zero_choices_raise_the_zero_scores():
    z_TN = torch.tensor(TOKENS[2:] * 2).log().requires_grad_()
    router, ctx, _ = routed(TOKENS)
    ctx = make_context(torch.ones(1, 2, dtype=torch.bool))
    decision = router.select(z_TN, torch.randn(2, 4), ctx)
    router.losses(decision, z_TN, ctx)["group_balance"].value.backward()
    assert (z_TN.grad[:, 4:] < 0).all() and z_TN.grad[:, :4].sum() > 0


def test_rows_of_zero_experts_are_drawn_dimension_by_dimension():
    router = make_router("zeda", {"zeros": 4000}, SPEC)
    gate_ED = torch.tensor([[1.0, 10, 0, -3], [3, 10, 0, 3], [1, 10, 1, -3], [3, 10, 1, 3]])
    router.adopt_gate(gate_ED)
    assert torch.equal(router.gate.weight, gate_ED)
    rows_MD = router.free_gate.weight
    torch.testing.assert_close(rows_MD.mean(0), gate_ED.mean(0), atol=0.2, rtol=0)
    torch.testing.assert_close(rows_MD.std(0), gate_ED.std(0), atol=0.1, rtol=0)
    assert abs(rows_MD.T.corrcoef()[0, 3]) < 0.1 < gate_ED.T.corrcoef()[0, 3]


def test_more_choices_than_there_are():
    with pytest.raises(ConfigError, match=r"k=6 exceeds the backbone's 4 experts \+ 1 free"):
        make_router("zeda", {"zeros": 1, "k": 6}, SPEC)
