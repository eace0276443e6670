"""Experts over ranks equal those of one process, in value, gradients and rows that travel."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from gemoe_ds.moe.dispatch import AllToAllDispatcher, LocalDispatcher
from gemoe_ds.moe.experts.module import Experts
from tests.helpers import gloo, run_ranks
from tests.moe.oracle import dispatch, grads_of, ragged_problem

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
    *want, gate_up_grad, down_grad = grads_of((expected * probe).sum(), leaves)
    for grad in (gate_up_grad, down_grad):  # an expert's owner sees the tokens of all ranks
        dist.all_reduce(grad)

    block = slice(rank * 4, rank * 4 + 4)
    mine = Experts(gate_up[block].clone(), down[block].clone(), trainable=True)
    dispatcher = AllToAllDispatcher(all_to_all, rank, size)
    got = dispatch(dispatcher, x, mask, weights, mine, lambda x: factor * x)
    leaves = [x, weights, factor, mine.gate_up_EGD, mine.down_EDF]
    have = grads_of((got * probe).sum(), leaves)

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
