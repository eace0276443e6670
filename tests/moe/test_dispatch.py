"""Dispatch, experts, combine equal the dense definition, on either path."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings

from gemoe_ds.moe.dispatch import LocalDispatcher
from gemoe_ds.moe.experts import by_expert, ffn, grouped
from gemoe_ds.moe.experts.module import Experts
from tests.moe.oracle import RAGGED, dense_moe, dispatch, grads_of, ragged_problem


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
    want = grads_of((expected * probe).sum(), leaves)
    have = grads_of((got * probe).sum(), own)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
