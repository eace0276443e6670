"""Either path of the experts' FFN, and which is taken."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from gemoe_ds.moe.dispatch import LocalDispatcher
from gemoe_ds.moe.experts import by_expert, ffn, grouped
from gemoe_ds.moe.experts.module import Experts
from tests.moe.oracle import dense_moe, dispatch, grads_of, ragged_problem


@pytest.mark.parametrize(
    ("path", "pack"), [(by_expert, False), (by_expert, True), (grouped, False)]
)
def test_bfloat16_is_near_float32(path, pack):
    x, mask, weights, gate_up, down = ragged_problem(3, 40, 8, 0.4, d=16, f=24)
    want = dense_moe(x, mask, weights, gate_up, down)
    want_grads = grads_of(want.sum(), [x, weights])
    x16, weights32 = (t.detach().to(d) for t, d in ((x, torch.bfloat16), (weights, torch.float32)))
    leaves = [x16.requires_grad_(), weights32.requires_grad_()]
    frozen = (gate_up.detach().bfloat16(), down.detach().bfloat16())
    with patch.object(ffn, "path_for", lambda *_: path):
        experts = Experts(*frozen, trainable=False, pack=pack)
        got = dispatch(LocalDispatcher(), x16, mask, weights32, experts)
    grads = grads_of(got.sum(), leaves)
    assert [got.dtype, *(g.dtype for g in grads)] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for a, b in zip([got, *grads], [want, *want_grads], strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


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
