"""Either path of the experts' FFN, and which is taken."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from gemoe_ds.moe.dispatch import LocalDispatcher
from gemoe_ds.moe.experts import by_expert, ffn, grouped, onednn
from gemoe_ds.moe.experts.module import Experts
from gemoe_ds.moe.plan import RoutingPlan
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


@pytest.mark.parametrize("tokens, share", [(0, 0.5), (1, 0.5), (1, 0.0), (9, 0.3), (40, 0.4)])
@pytest.mark.parametrize("pack, in_tiles", [(False, False), (True, False), (False, True)])
def test_a_few_rows_an_expert_are_written_as_many_are(tokens, share, pack, in_tiles, monkeypatch):
    """Without gradients, as answers are written: one row, several, none, and 17 of an expert."""
    monkeypatch.setattr(onednn, "_has_tiles", lambda: in_tiles)
    x, mask, weights, gate_up, down = (
        t.detach() for t in ragged_problem(4, tokens, 8, share, d=16, f=24)
    )
    mask[:16, 2], mask[:, 5] = True, False  # as many as count as few; idle
    if tokens == 40:
        mask[:17, 3] = True
    with torch.no_grad(), patch.object(ffn, "path_for", lambda *_: by_expert):
        got = dispatch(LocalDispatcher(), x, mask, weights, Experts(gate_up, down, trainable=False))
        want = dense_moe(x, mask, weights, gate_up, down)
        torch.testing.assert_close(got, want)
        stored = (gate_up.bfloat16(), down.bfloat16())
        narrow = Experts(*stored, trainable=False, pack=pack)
        got16 = dispatch(LocalDispatcher(), x.bfloat16(), mask, weights.float(), narrow)
    assert (got16 - want).norm() <= 0.02 * want.norm()


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_spare_entries_of_a_plan_add_nothing(share):
    """A bound on their number stands for it on a GPU; no token may have chosen any expert."""
    x, mask, weights, gate_up, down = (
        t.detach() for t in ragged_problem(5, 3, 8, share, d=16, f=24)
    )
    size = int(mask.sum()) + 2
    plan = RoutingPlan.from_mask(mask, weights, num_assignments=size, may_have_spare=True)
    with patch.object(ffn, "path_for", lambda *_: by_expert):
        got = Experts(gate_up, down, trainable=False)(x, plan)
    torch.testing.assert_close(got, dense_moe(x, mask, weights, gate_up, down))


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


def test_parameters_cost_nothing_where_no_gradient_is_wanted():
    """As an exported model's, which want one whenever grad mode is on: nothing is kept for it."""
    x, mask, weights, gate_up, down = ragged_problem(3, 6, 8, 0.4, d=16, f=24)
    experts = Experts(gate_up.detach(), down.detach(), trainable=True)
    kept = []
    with patch.object(by_expert, "forward", wraps=by_expert.forward) as path:
        with patch.object(ffn, "path_for", lambda *_: by_expert):
            want = dispatch(LocalDispatcher(), x, mask, weights, experts)
            with torch.no_grad():
                got = dispatch(LocalDispatcher(), x, mask, weights, experts)
        kept = [call.kwargs["keep"] for call in path.call_args_list]
    assert kept == [True, False] and not got.requires_grad
    torch.testing.assert_close(got, want.detach())
