"""Masks of the best experts, k the same for all tokens or one for each; ranges of k."""

from __future__ import annotations

import pytest
import torch

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.router import RoutingSpec
from gemoe_ds.moe.selection import k_range, top_k_mask


def test_the_best_experts_of_every_token():
    scores_TE = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.0, 0.2, 0.1]])
    assert top_k_mask(scores_TE, 2).nonzero().tolist() == [[0, 1], [0, 3], [1, 0], [1, 2]]
    of_each = top_k_mask(scores_TE, 3, torch.tensor([3, 1]))
    assert of_each.tolist() == [[False, True, True, True], [True, False, False, False]]
    assert not top_k_mask(scores_TE, 4, torch.tensor([0.0, 0.0])).any()
    assert top_k_mask(scores_TE, 4).all() and top_k_mask(scores_TE[:0], 4).shape == (0, 4)


def test_ties_and_columns_that_nobody_wants_leave_k_as_it_is():
    scores_TE = torch.full((5, 8), 0.125)
    scores_TE[:, 6:] = -torch.inf
    k_T = torch.arange(1, 6)
    assert top_k_mask(scores_TE, 6, k_T).sum(1).tolist() == k_T.tolist()


def test_a_range_of_k_leaves_a_choice():
    spec = RoutingSpec(d_model=16, num_experts=64, top_k=8, norm_topk_prob=False)
    assert k_range(1, None, 8, spec) == (1, 8) and k_range(2, 64, 8, spec) == (2, 64)
    for low, high, said in (
        (9, None, "k_low=9, k_high=8 must satisfy k_low <= k_high <= 64"),
        (1, 65, "k_high=65 must satisfy"),
        (8, None, "k_low=8, k_high=8 leave no k to choose; .*own k is 8"),
    ):
        with pytest.raises(ConfigError, match=said):
            k_range(low, high, 8, spec)
