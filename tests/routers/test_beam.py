"""BEAM by hand: masks over the top-k, their straight-through gradient, the L1 loss."""

from __future__ import annotations

import math

import pytest
import torch

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.dispatch import LocalDispatcher
from gemoe_ds.moe.experts.module import Experts
from gemoe_ds.moe.layer import MoELayer
from gemoe_ds.moe.router import RoutingSpec
from tests.routers.cases import SPEC as WIDE
from tests.routers.cases import make_context, make_router, ragged_tokens

SPEC = RoutingSpec(d_model=4, num_experts=4, top_k=2, norm_topk_prob=True)
P = [[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.4, 0.3]]
# Of each expert and token: what goes into the sigmoid.
MASKS = [[1.0, -1.0, 2.0, 1.0], [-1.0, 1.0, 0.1, 0.2]]


def routed(**options):
    """The tokens are unit vectors, so that the masks' logits can be written down."""
    router = make_router("beam", options, SPEC).train()
    with torch.no_grad():
        router.mask.bias.zero_()
        router.mask.map.weight.zero_()[:, :2] = torch.tensor(MASKS).T
    ctx = make_context(torch.ones(1, 2, dtype=torch.bool))
    return router, ctx, router.select(torch.tensor(P).log(), torch.eye(4)[:2], ctx)


def test_masks_close_experts_of_top_k_and_open_no_others():
    router, _, decision = routed()
    assert decision.mask_TE.tolist() == [[True, False, False, False], [False, False, True, True]]
    assert decision.weights_TE[decision.mask_TE].tolist() == pytest.approx([5 / 8, 4 / 7, 3 / 7])
    assert router.eval().plan(decision).token_ids_A.tolist() == [0, 1, 1]


def test_in_training_masked_experts_run_with_weight_zero():
    router, _, decision = routed()
    plan = router.plan(decision)
    assert plan.token_ids_A.tolist() == [0, 0, 1, 1]
    assert plan.weights_A.tolist() == pytest.approx([5 / 8, 0, 4 / 7, 3 / 7])


def test_gradient_passes_the_cut_as_it_passes_the_sigmoid():
    """d weight / d logit = g sigma'(logit) for all of top-k, open or not; 0 for all others."""
    router, _, decision = routed()
    router.plan(decision).weights_A.sum().backward()
    g_TE = torch.tensor([[5 / 8, 3 / 8, 0, 0], [0, 0, 4 / 7, 3 / 7]])
    sigma = torch.tensor(MASKS).sigmoid()
    torch.testing.assert_close(
        router.mask.map.weight.grad[:, :2].T, g_TE * sigma * (1 - sigma), atol=1e-6, rtol=1e-5
    )


def test_sparsity_is_the_open_share_of_k():
    router, ctx, decision = routed()
    term = router.losses(decision, decision.scores_TE.log(), ctx)["sparsity"]
    assert (term.value.item(), term.weight) == (3 / 4, 0.1)
    term.value.backward()
    sigma = torch.tensor(MASKS).sigmoid()
    expected = sigma * (1 - sigma) * torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]) / 4
    torch.testing.assert_close(router.mask.map.weight.grad[:, :2].T, expected)


def test_balance_is_of_top_k_whatever_is_open():
    router, ctx, decision = routed()
    value = router.losses(decision, decision.scores_TE.log(), ctx)["load_balance"].value
    assert math.isclose(value.item(), 4 * (torch.tensor(P).mean(0) / 4).sum().item(), rel_tol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_starts_as_top_k(seed):
    x_TD, ctx = ragged_tokens(seed)
    beam, top_k = (make_router(name, {}) for name in ("beam", "top_k"))
    with torch.no_grad():
        top_k.gate.weight.copy_(beam.gate.weight)
    found, expected = beam(x_TD, ctx), top_k(x_TD, ctx)
    assert torch.equal(found.token_ids_A, expected.token_ids_A)
    assert torch.equal(found.weights_A, expected.weights_A)


def test_a_layer_trains_and_evaluates_to_the_same_output():
    """What runs with weight 0 adds nothing; k and losses count open experts only."""
    router = make_router("beam", {"start": 0.501})
    torch.nn.init.normal_(router.mask.map.weight)
    x_TD, ctx = ragged_tokens(2)
    experts = Experts(torch.randn(8, 12, 16), torch.randn(8, 16, 6), trainable=True)
    layer = MoELayer(router, experts, LocalDispatcher(), ctx)
    ctx.trace = True
    found = []
    for mode in (True, False):
        ctx.begin(ctx.is_valid_T[None], ctx.is_vision_T[None])
        y_TD = layer.train(mode)(x_TD[None])[0]
        found.append((y_TD, ctx.layers[0].k_T))
    torch.testing.assert_close(found[0], found[1])
    assert 0 < found[0][1].float().mean() < 0.75 * WIDE.top_k


def test_the_cut_moves_k_from_0_to_all_of_top_k():
    x_TD, ctx = ragged_tokens(2)
    router = make_router("beam", {}).eval()
    torch.nn.init.normal_(router.mask.map.weight)
    found = []
    for router.cut in (1.0, 0.9, 0.5, 0.1, 0.0):
        found.append(router(x_TD, ctx).token_ids_A.numel() / int(ctx.is_valid_T.sum()))
    assert found == sorted(set(found)) and (found[0], found[-1]) == (0, WIDE.top_k)


def test_more_experts_than_there_are():
    with pytest.raises(ConfigError, match="k=5 exceeds the backbone's 4 experts"):
        make_router("beam", {"k": 5}, SPEC)
