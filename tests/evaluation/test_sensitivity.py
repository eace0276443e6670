"""A budget shared out among layers is the best of all that could be tried."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gemoe_ds.evaluation.sensitivity import measure_losses, share_out
from tests.routers.cases import at_slot, make_router


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k_low, budget", [(1, 4), (1, 8), (0, 9), (2, 12)])
def test_no_other_way_to_spend_it_loses_less(seed, k_low, budget):
    loss_LK = np.random.default_rng(seed).random((4, 4)).round(2)
    k_L = share_out(loss_LK, k_low, k_low + budget / 4)
    assert sum(k_L) == pytest.approx(4 * k_low + budget) and all(k == int(k) for k in k_L)

    def lost(more_L):
        return sum(loss_K[more] for loss_K, more in zip(loss_LK, more_L, strict=True))

    every = [w for w in itertools.product(range(4), repeat=4) if sum(w) == budget]
    assert lost([int(k) - k_low for k in k_L]) == pytest.approx(min(map(lost, every)))


def test_what_is_left_of_the_budget_goes_where_it_gains_most():
    loss_LK = np.array([[3.0, 1.0, 0.9], [3.0, 2.0, 0.1]])
    assert share_out(loss_LK, 1, 2.25) == [2.0, 2.5]  # 1.9 is gained there, 0.1 in the other layer
    assert share_out(loss_LK, 1, 2.0) == [2.0, 2.0]


def test_one_layer_at_a_time_has_fewer():
    routers = [
        make_router("alloc_moe", {}, at_slot(make_router("alloc_moe", {}).spec, s)) for s in (0, 1)
    ]
    seen = []

    def loss():
        seen.append(tuple((router.k_low, router.k_high) for router in routers))
        return float(len(seen))

    loss_LK = measure_losses(routers, loss)
    assert seen[0] == ((4, 4), (4, 4))
    assert seen[1:4] == [((k, k), (4, 4)) for k in (1, 2, 3)]
    assert seen[4:] == [((4, 4), (k, k)) for k in (1, 2, 3)]
    assert loss_LK.tolist() == [[2, 3, 4, 1], [5, 6, 7, 1]]
    assert [(router.k_low, router.k_high) for router in routers] == [(1, 4)] * 2
