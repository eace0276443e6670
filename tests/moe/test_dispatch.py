"""Dispatch, experts, combine equal the dense definition, here and over ranks, on either path."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from gemoe_ds.moe.dispatch import AllToAllDispatcher, Dispatcher, LocalDispatcher
from gemoe_ds.moe.experts import by_expert, ffn, grouped
from gemoe_ds.moe.experts.module import Experts
from gemoe_ds.moe.experts.weights import PackedExpertWeights
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


def dispatch(dispatcher: Dispatcher, x, mask, weights, experts, shared=None):
    return dispatcher(x, weights, dispatcher.dispatch_preprocess(mask), experts, shared)


@pytest.mark.parametrize("path", [by_expert, grouped])
@pytest.mark.parametrize("trainable", [True, False])
@settings(max_examples=40, deadline=None)
@given(**RAGGED)
def test_local_equals_dense(path, trainable, seed, tokens, experts, density):
    # the grouped product takes no float64
    dtype = torch.float64 if path is by_expert else torch.float32
    problem = ragged_problem(seed, tokens, experts, density)
    x, mask, weights, gate_up, down = (
        p if p.dtype == torch.bool else p.detach().to(dtype).requires_grad_() for p in problem
    )
    probe = torch.randn(tokens, x.shape[1], dtype=dtype)
    expected = dense_moe(x, mask, weights, gate_up, down)
    layer = Experts(gate_up.detach().clone(), down.detach().clone(), trainable=trainable)
    with patch.object(ffn, "path_for", lambda *_: path):
        got = dispatch(LocalDispatcher(), x, mask, weights, layer)
    tolerance = {"rtol": 1e-5, "atol": 2e-4} if dtype == torch.float32 else {}
    torch.testing.assert_close(got, expected, **tolerance)
    leaves, own = [x, weights], [x, weights]
    if trainable:
        leaves, own = [*leaves, gate_up, down], [*own, layer.gate_up_EGD, layer.down_EDF]
    want = _grads((expected * probe).sum(), leaves)
    have = _grads((got * probe).sum(), own)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


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


@pytest.mark.parametrize(
    ("path", "pack"), [(by_expert, False), (by_expert, True), (grouped, False)]
)
def test_bfloat16_is_near_float32(path, pack):
    x, mask, weights, gate_up, down = ragged_problem(3, 40, 8, 0.4, d=16, f=24)
    want = dense_moe(x, mask, weights, gate_up, down)
    want_grads = _grads(want.sum(), [x, weights])
    x16, weights32 = (t.detach().to(d) for t, d in ((x, torch.bfloat16), (weights, torch.float32)))
    leaves = [x16.requires_grad_(), weights32.requires_grad_()]
    frozen = (gate_up.detach().bfloat16(), down.detach().bfloat16())
    with patch.object(ffn, "path_for", lambda *_: path):
        experts = Experts(*frozen, trainable=False, pack=pack)
        got = dispatch(LocalDispatcher(), x16, mask, weights32, experts)
    grads = _grads(got.sum(), leaves)
    assert [got.dtype, *(g.dtype for g in grads)] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for a, b in zip([got, *grads], [want, *want_grads], strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


@patch.object(ffn, "path_for", lambda *_: by_expert)
def test_packed_weights_follow_the_module():
    """Packed copies are of no use once the weights are others, or have another dtype."""
    x, mask, weights, gate_up, down = ragged_problem(5, 20, 4, 0.5, d=16)
    x16, weights32 = x.detach().bfloat16(), weights.detach().float()
    plan = RoutingPlan.from_mask(mask, weights32)
    experts = Experts(gate_up.detach().bfloat16(), down.detach().bfloat16(), trainable=False)
    first = experts(x16, plan)
    assert isinstance(experts._packed, PackedExpertWeights), "or this CPU has no bfloat16"
    experts.gate_up_EGD = -experts.gate_up_EGD  # silu(-gate) * -up: something else
    second = experts(x16, plan)
    plain = Experts(experts.gate_up_EGD, experts.down_EDF, trainable=False, pack=False)
    torch.testing.assert_close(second, plain(x16, plan), rtol=0.05, atol=0.5)
    assert (first - second).norm() > 0.1 * first.norm()
    torch.testing.assert_close(
        experts.float()(x.detach().float(), plan), plain.float()(x.detach().float(), plan)
    )


def test_autocast_multiplies_in_its_dtype():
    x, mask, weights, gate_up, down = ragged_problem(4, 20, 4, 0.5)
    x32, weights32 = x.detach().float().requires_grad_(), weights.detach().float()
    layer = Experts(gate_up.detach().float(), down.detach().float(), trainable=True)
    rounded = [p.detach().bfloat16().double().requires_grad_() for p in (gate_up, down)]
    want = dense_moe(x, mask, weights, *rounded)
    with torch.autocast("cpu", torch.bfloat16):
        got = dispatch(LocalDispatcher(), x32, mask, weights32, layer)
    assert got.dtype == torch.float32
    have = _grads(got.sum(), [x32, layer.gate_up_EGD, layer.down_EDF])
    for a, b in zip([got, *have], [want, *_grads(want.sum(), [x, *rounded])], strict=True):
        assert 0 < (a - b).norm() < 0.02 * b.norm(), "bf16 products, no more and no less"


@pytest.mark.parametrize(
    ("device", "dtype", "d_model", "width", "path"),
    [
        ("cpu", torch.bfloat16, 2048, 1024, by_expert),
        ("cpu", torch.bfloat16, 64, 16, grouped),
        ("cpu", torch.float64, 64, 16, by_expert),
        ("cuda", torch.bfloat16, 2048, 1024, grouped),
        ("cuda", torch.float32, 2048, 1024, by_expert),
        ("cuda", torch.bfloat16, 12, 16, by_expert),
    ],
)
def test_path_suits_the_device(device, dtype, d_model, width, path):
    assert ffn.path_for(torch.device(device), dtype, d_model, width) is path


def test_frozen_experts_are_invisible_to_optimizer_and_checkpoint():
    experts = Experts(torch.randn(2, 16, 8), torch.randn(2, 8, 8), trainable=False)
    assert not list(experts.parameters()) and not experts.state_dict()
    x = torch.randn(3, 8, requires_grad=True)
    plan = RoutingPlan.from_mask(torch.eye(3, 2, dtype=torch.bool), torch.ones(3, 2))
    experts(x, plan).sum().backward()
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


def all_to_all(output, rows, output_splits, input_splits):
    return dist.all_to_all_single(output, rows, output_splits, input_splits, async_op=True)


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
    factor = torch.full((), 0.5, dtype=dtype, requires_grad=True)
    expected = dispatch(LocalDispatcher(), x, mask, weights, everything, lambda x: factor * x)
    leaves = [x, weights, factor, everything.gate_up_EGD, everything.down_EDF]
    *want, gate_up_grad, down_grad = _grads((expected * probe).sum(), leaves)
    for grad in (gate_up_grad, down_grad):  # an expert's owner sees the tokens of all ranks
        dist.all_reduce(grad)

    block = slice(rank * 4, rank * 4 + 4)
    mine = Experts(gate_up[block].clone(), down[block].clone(), trainable=True)
    dispatcher = AllToAllDispatcher(all_to_all, rank, size)
    got = dispatch(dispatcher, x, mask, weights, mine, lambda x: factor * x)
    leaves = [x, weights, factor, mine.gate_up_EGD, mine.down_EDF]
    have = _grads((got * probe).sum(), leaves)

    per_rank = mask.view(tokens, size, 4).any(-1)
    remote_pairs = int(per_rank.sum() - per_rank[:, rank].sum())
    assert dispatcher.traffic.rows == remote_pairs
    assert dispatcher.traffic.row_bytes == 2 * remote_pairs * d * x.itemsize
    remote_assignments = int(mask.sum() - mask[:, block].sum())
    assert dispatcher.traffic.metadata_bytes == (
        remote_assignments * 2 * weights.itemsize + (size - 1) * (1 + 4) * 8
    )
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
