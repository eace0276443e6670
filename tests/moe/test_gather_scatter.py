"""Gathering and summing rows, and that each is the other's gradient."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemoe_ds.moe.gather_scatter import gather_rows, scatter_add_rows


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(0, 9), picked=st.sampled_from([0, 5, 300, 700]))
def test_equal_the_plain_operations(seed, rows, picked):
    g = torch.Generator().manual_seed(seed)
    picked = picked if rows else 0
    ids = torch.randint(max(rows, 1), (picked,), generator=g)
    x = torch.randn(rows, 3, generator=g, dtype=torch.float64, requires_grad=True)
    y = torch.randn(picked, 3, generator=g, dtype=torch.float64, requires_grad=True)
    probe_x, probe_y = torch.randn_like(y), torch.randn_like(x)
    pairs = [
        (gather_rows(x, ids), x.index_select(0, ids), x, probe_x),
        (scatter_add_rows(y, ids, rows), torch.zeros_like(x).index_add(0, ids, y), y, probe_y),
    ]
    for have, want, leaf, probe in pairs:
        torch.testing.assert_close(have, want)
        a, b = (torch.autograd.grad((out * probe).sum(), leaf)[0] for out in (have, want))
        torch.testing.assert_close(a, b)


def test_small_numbers_are_not_lost_in_bfloat16():
    rows = torch.full((512, 1), 1.0, dtype=torch.bfloat16)
    ids = torch.zeros(512, dtype=torch.long)
    assert scatter_add_rows(rows, ids, 1).item() == 512  # a bf16 sum stops at 256
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    gather_rows(x, ids).sum().backward()
    assert x.grad.item() == 512
