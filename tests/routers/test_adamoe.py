"""AdaMoE by hand: nulls take choices away, share their load, and weigh nothing."""

from __future__ import annotations

import math

import pytest
import torch

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.router import RoutingSpec
from gemoe_ds.moe.selection import top_k_mask
from gemoe_ds.moe.step_context import StepContext
from tests.routers.cases import make_context, make_router

SPEC = RoutingSpec(d_model=4, num_experts=4, top_k=2, norm_topk_prob=False)


def routed(probabilities, **options):
    p_TN = torch.tensor(probabilities)
    router = make_router("adamoe", {"nulls": 2} | options, SPEC)
    ctx = make_context(torch.ones(1, len(p_TN), dtype=torch.bool))
    return router, ctx, router.select(p_TN.log(), torch.randn(len(p_TN), 4), ctx)


TOKENS = [
    [0.3, 0.1, 0.05, 0.05, 0.4, 0.1],  # one true, one null
    [0.1, 0.05, 0.05, 0.1, 0.3, 0.4],  # both null
    [0.4, 0.3, 0.1, 0.1, 0.05, 0.05],  # both true
]


def test_nulls_leave_fewer_true_experts():
    router, _, decision = routed(TOKENS)
    assert router.split(decision.mask_TE)[0].sum(1).tolist() == [1, 0, 2]
    assert router.plan(decision).token_ids_A.tolist() == [0, 2, 2]
    assert router.free_output(torch.randn(3, 4), decision) is None


@pytest.mark.parametrize(
    "how, expected",
    [
        ("sum", [1.0, 4 / 7, 3 / 7]),  # over the chosen true ones
        ("all", [3 / 7, 4 / 7, 3 / 7]),  # over all chosen
        ("none", [0.3 / 0.5, 0.4 / 0.9, 0.3 / 0.9]),  # softmax over the true ones
        ("backbone", [0.3 / 0.5, 0.4 / 0.9, 0.3 / 0.9]),
    ],
)
def test_weights(how, expected):
    router, _, decision = routed(TOKENS, norm_topk_prob=how)
    weights_TE, mask_TE = router.split(decision.weights_TE)[0], router.split(decision.mask_TE)[0]
    torch.testing.assert_close(weights_TE[mask_TE], torch.tensor(expected))


def test_balance_counts_nulls_as_their_mean():
    """N sum f~ P over tokens 0..2: true f = 2/3, 1/3, 0, 0; nulls 2/3 and 1/3, so 1/2 each."""
    router, ctx, decision = routed(TOKENS)
    p_N = torch.tensor(TOKENS).mean(0)
    share_N = torch.tensor([2 / 3, 1 / 3, 0, 0, 1 / 2, 1 / 2])
    value = router.losses(decision, decision.scores_TE.log(), ctx)["load_balance"].value
    assert math.isclose(value.item(), 0.02 * 6 * (share_N @ p_N).item(), rel_tol=1e-5)


def test_perfect_balance_gives_alpha_times_k():
    p_TN = torch.full((6, 6), 0.1) + 0.2 * (torch.eye(6) + torch.eye(6).roll(1, 1))
    router, ctx, decision = routed((p_TN / p_TN.sum(1, keepdim=True)).tolist())
    value = router.losses(decision, decision.scores_TE.log(), ctx)["load_balance"].value
    assert math.isclose(value.item(), 0.02 * 2, rel_tol=1e-5)


@pytest.mark.parametrize("nulls", [1, 3, 4, 6, 8, 11])
def test_null_rows_start_as_copies_of_every_true_one_equally_often(nulls):
    router = make_router("adamoe", {"nulls": nulls, "k": 2}, SPEC)
    rows = [tuple(row.tolist()) for row in router.gate.weight]
    times = [[tuple(row.tolist()) for row in router.free_gate.weight].count(row) for row in rows]
    assert sum(times) == nulls and max(times) - min(times) <= 1
    copied = [e for e, count in enumerate(times) if count > min(times)]
    gaps = [b - a for a, b in zip(copied, copied[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1, "those copied once more are spread evenly"


@pytest.mark.parametrize("nulls", [16, 64, 128])
def test_k_starts_near_the_share_of_true_rows(nulls):
    spec = RoutingSpec(d_model=32, num_experts=64, top_k=8, norm_topk_prob=False)
    router = make_router("adamoe", {"nulls": nulls}, spec)
    mask_TN = top_k_mask(router.score(torch.randn(500, 32), None), 8)
    mean_k = mask_TN[:, :64].sum().item() / 500
    assert mean_k == pytest.approx(8 * 64 / (64 + nulls), rel=0.05)


def test_coefficient_falls_at_half_time():
    router = make_router("adamoe", {}, SPEC)
    for step, expected in ((4, 0.02), (5, 1e-4)):
        router.after_step(StepContext(step, 10, {}, {}, None, None, None))
        assert math.isclose(router.balance.item(), expected, rel_tol=1e-6)


def test_more_choices_than_there_are():
    with pytest.raises(ConfigError, match=r"k=6 exceeds the backbone's 4 experts \+ 1 free"):
        make_router("adamoe", {"nulls": 1, "k": 6}, SPEC)


@pytest.mark.parametrize("nulls, copied", [(2, [0, 2]), (4, [0, 1, 2, 3]), (6, [0, 0, 1, 2, 2, 3])])
def test_null_rows_are_copies_from_all_over_the_gate(nulls, copied):
    router = make_router("adamoe", {"nulls": nulls}, SPEC)
    gate_ED = torch.arange(16.0).view(4, 4)
    router.adopt_gate(gate_ED)
    assert torch.equal(router.free_gate.weight, gate_ED[copied])
