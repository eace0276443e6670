"""Dispatch, experts, combine equal the dense definition, here and over ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from gemoe_ds.moe.dispatch import AllToAllDispatcher, LocalDispatcher
from gemoe_ds.moe.experts import Experts, grouped_linear
from gemoe_ds.moe.plan import RoutingPlan
from tests.helpers import gloo, run_ranks
from tests.moe.oracle import dense_moe, ragged_problem

RAGGED = {
    "seed": st.integers(0, 2**31),
    "tokens": st.integers(0, 12),
    "experts": st.integers(1, 6),
    "density": st.sampled_from([0.0, 0.2, 0.6, 1.0]),
}


def _grads(loss, leaves):
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, leaves, strict=True)]


@settings(max_examples=60, deadline=None)
@given(**RAGGED)
def test_local_equals_dense(seed, tokens, experts, density):
    x, mask, weights, gate_up, down = ragged_problem(seed, tokens, experts, density)
    probe = torch.randn(tokens, x.shape[1], dtype=torch.float64)
    expected = dense_moe(x, mask, weights, gate_up, down)
    layer = Experts(gate_up.detach().clone(), down.detach().clone(), trainable=True)
    got = LocalDispatcher()(x, RoutingPlan.from_mask(mask, weights), layer)
    torch.testing.assert_close(got, expected)
    want = _grads((expected * probe).sum(), [x, weights, gate_up, down])
    have = _grads((got * probe).sum(), [x, weights, layer.gate_up_EGD, layer.down_EDF])
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=30, deadline=None)
@given(**RAGGED)
def test_plan_lists_the_mask(seed, tokens, experts, density):
    _, mask, weights, *_ = ragged_problem(seed, tokens, experts, density)
    plan = RoutingPlan.from_mask(mask, weights)
    listed = [(e, t) for e in range(experts) for t in range(tokens) if mask[t, e]]
    assert plan.tokens_per_expert_E.tolist() == [
        sum(e == i for e, _ in listed) for i in range(experts)
    ]
    assert plan.token_ids_A.tolist() == [t for _, t in listed]
    assert plan.weights_A.tolist() == [weights[t, e].item() for e, t in listed]
    assert (plan.num_tokens, plan.num_experts) == (tokens, experts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[0, 5, 0, 3], [8, 0, 0, 0], [0, 0, 0, 0]])
def test_grouped_product_equals_loop(dtype, counts):
    rows = torch.randn(sum(counts), 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 24, 16, dtype=dtype, requires_grad=True)
    parts = rows.split(counts)
    expected = torch.cat([p @ w.t() for p, w in zip(parts, weight, strict=True)])
    got = grouped_linear(rows, weight, torch.tensor(counts))
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    )
    torch.testing.assert_close(got, expected, **tolerance)
    for a, b in zip(
        _grads(got.sum(), [rows, weight]), _grads(expected.sum(), [rows, weight]), strict=True
    ):
        torch.testing.assert_close(a, b, **tolerance)


def test_frozen_experts_are_invisible_to_optimizer_and_checkpoint():
    experts = Experts(torch.randn(2, 16, 8), torch.randn(2, 8, 8), trainable=False)
    assert not list(experts.parameters()) and not experts.state_dict()
    x = torch.randn(3, 8, requires_grad=True)
    experts(x, torch.ones(3), torch.tensor([1, 2])).sum().backward()
    assert x.grad is not None and experts.gate_up_EGD.grad is None


CASES = {  # name -> mask of (rank, tokens, experts)
    "random": lambda rank, t, e: (
        torch.rand(t, e, generator=torch.Generator().manual_seed(rank)) < 0.4
    ),
    "all to one expert": lambda rank, t, e: torch.arange(e).expand(t, e) == 0,
    "idle rank": lambda rank, t, e: (torch.arange(e) < e // 2).expand(t, e).clone(),
    "k = 0 on rank 1": lambda rank, t, e: torch.full((t, e), rank == 0),
    "k = 0 everywhere": lambda rank, t, e: torch.zeros(t, e, dtype=torch.bool),
}


def _ep_case(rank: int, case: str, tokens_by_rank: list[int], dtype: torch.dtype):
    size, experts, d = dist.get_world_size(), 4 * dist.get_world_size(), 8
    tokens = tokens_by_rank[rank]
    x, _, weights, *_ = ragged_problem(10 + rank, tokens, experts, 0.5)
    _, _, _, gate_up, down = ragged_problem(99, 1, experts, 0.5)  # the same on all ranks
    mask = CASES[case](rank, tokens, experts)
    probe = torch.randn(tokens, d, generator=torch.Generator().manual_seed(rank)).to(dtype)
    x = x.detach().to(dtype).requires_grad_()
    weights = weights.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    gate_up, down = gate_up.detach().to(dtype), down.detach().to(dtype)

    everything = Experts(gate_up, down, trainable=True)
    expected = LocalDispatcher()(x, RoutingPlan.from_mask(mask, weights), everything)
    leaves = [x, weights, everything.gate_up_EGD, everything.down_EDF]
    *want, gate_up_grad, down_grad = _grads((expected * probe).sum(), leaves)
    for grad in (gate_up_grad, down_grad):  # an expert's owner sees the tokens of all ranks
        dist.all_reduce(grad)

    block = slice(rank * 4, rank * 4 + 4)
    mine = Experts(gate_up[block].clone(), down[block].clone(), trainable=True)
    dispatcher = AllToAllDispatcher(dist.all_to_all_single, rank, size)
    got = dispatcher(x, RoutingPlan.from_mask(mask, weights), mine)
    leaves = [x, weights, mine.gate_up_EGD, mine.down_EDF]
    have = _grads((got * probe).sum(), leaves)

    per_rank = mask.view(tokens, size, 4).any(-1)
    remote_pairs = int(per_rank.sum() - per_rank[:, rank].sum())
    assert dispatcher.traffic.rows == remote_pairs
    assert dispatcher.traffic.row_bytes == 2 * remote_pairs * d * x.itemsize
    tolerance = {} if dtype == torch.float64 else {"rtol": 3e-2, "atol": 1e-1}
    torch.testing.assert_close(got, expected, **tolerance)
    for a, b in zip(have, [*want, gate_up_grad[block], down_grad[block]], strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    return got.dtype


def _ep_cases(rank: int, cases: list):
    gloo()
    for case, tokens, dtype in cases:
        assert _ep_case(rank, case, tokens, dtype) == dtype


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_to_all_equals_local(ranks):
    tokens = [5, 9, 3, 7][:ranks]
    with_empty = [6, 0, 4, 0][:ranks]
    cases = [(case, t, torch.float64) for case in CASES for t in (tokens, with_empty)]
    cases += [("random", tokens, torch.bfloat16)]
    run_ranks(_ep_cases, ranks, cases)
