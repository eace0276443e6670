"""EvoMoE's router: starts as the pretrained one; vision and text have networks of their own."""

from __future__ import annotations

import torch

from gemoe_ds.routers.evomoe import HyperNetwork
from tests.routers.cases import SPEC, make_router, ragged_tokens


def test_starts_as_the_pretrained_routing():
    x_TD, ctx = ragged_tokens(0)
    static, evo = make_router("top_k", {}), make_router("evomoe", {})
    with torch.no_grad():
        evo.gate.weight.copy_(static.gate.weight)
    first, second = static(x_TD, ctx), evo(x_TD, ctx)
    assert first.token_ids_A.tolist() == second.token_ids_A.tolist()
    torch.testing.assert_close(first.weights_A, second.weights_A)


def test_hypernetwork_equals_its_definition():
    torch.manual_seed(0)
    net = HyperNetwork(inner=5, hidden=3, rank=2)
    z_TI = torch.randn(4, 5)
    expected = []
    for z in z_TI:
        theta = net.second(net.first(z)).view(6, 5)
        hidden = torch.nn.functional.silu(theta[:2] @ z) * (theta[2:4] @ z)
        expected.append(hidden @ theta[4:])
    torch.testing.assert_close(net(z_TI), torch.stack(expected))


def test_each_modality_trains_its_own_network():
    router = make_router("evomoe", {"gate": "none"})
    x_TD, ctx = ragged_tokens(2)
    for tokens, trained, other in (
        (ctx.is_vision_T & ctx.is_valid_T, "of_vision", "of_text"),
        (~ctx.is_vision_T & ctx.is_valid_T, "of_text", "of_vision"),
    ):
        router.zero_grad()
        router.score(x_TD, ctx)[tokens].square().sum().backward()
        grads = {n: p.grad.abs().sum() for n, p in router.named_parameters() if p.grad is not None}
        assert all(g > 0 for n, g in grads.items() if n.startswith(trained))
        assert all(g == 0 for n, g in grads.items() if n.startswith(other))


def test_paper_takes_one_expert_with_its_raw_score():
    x_TD, ctx = ragged_tokens(1)
    router = make_router("evomoe", {"k": 1, "gate": "none"})
    plan = router(x_TD, ctx)
    assert plan.token_ids_A.numel() == int(ctx.is_valid_T.sum())
    best = router.score(x_TD, ctx).softmax(-1).max(1).values[plan.token_ids_A]
    torch.testing.assert_close(plan.weights_A, best)
    assert router.max_k == 1 and SPEC.top_k == 4
