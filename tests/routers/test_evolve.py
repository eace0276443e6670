"""Expert evolution by hand: who trains, and who follows how far."""

from __future__ import annotations

import pytest
import torch

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.experts.module import Experts
from gemoe_ds.moe.step_context import StepContext
from tests.routers.cases import SPEC, make_context, make_router


def assign_(parameter, value):
    with torch.no_grad():
        parameter.copy_(value)


def made(**options):
    torch.manual_seed(0)
    router = make_router("evolve", options)
    one = torch.randn(8, 16), torch.randn(16, 4)
    experts = Experts(*(w.repeat(8, 1, 1) for w in one), trainable=True)
    router.before_steps(experts, lambda p: p.detach(), lambda t: t)
    return router, experts


def step(router, experts, number):
    """An update of expert 0, and what the router does after it."""
    with torch.no_grad():
        experts.gate_up_EGD[0] += number
        experts.down_EDF[0] -= number
    router.after_step(StepContext(number, 10, {}, {}, assign_, lambda p: p.detach(), experts))


def test_every_token_goes_to_the_one_that_trains():
    router, _ = made()
    plan = router(torch.randn(5, 16), make_context(torch.ones(1, 5, dtype=torch.bool)))
    assert plan.tokens_per_expert_E.tolist() == [5] + [0] * 7
    assert plan.weights_A.tolist() == [1.0] * 5
    assert not router.gate.weight.requires_grad


def test_each_follows_by_one_minus_its_beta():
    router, experts = made()
    start = experts.gate_up_EGD[1].clone().detach()
    for number in (1, 2, 3):
        step(router, experts, number)
    for expert in range(1, 8):
        drawn = [router.beta(number, expert) for number in (1, 2, 3)]
        low, high = ((0.9, 0.99), (0.8, 0.89), (0.7, 0.79))[(expert - 1) % 3]
        assert all(low <= beta <= high for beta in drawn) and len(set(drawn)) == 3
        moved = sum((1 - beta) * number for beta, number in zip(drawn, (1, 2, 3), strict=True))
        torch.testing.assert_close(experts.gate_up_EGD[expert].detach(), start + moved)


def test_beta_zero_copies_and_one_stands_still():
    router, experts = made(beta=((0.0, 0.0), (1.0, 1.0)))
    start = experts.down_EDF[2].clone().detach()
    step(router, experts, 1)
    torch.testing.assert_close(experts.down_EDF[1], experts.down_EDF[0])
    assert torch.equal(experts.down_EDF[2], start)


def test_wrong_settings_are_refused():
    router, _ = made()
    frozen = Experts(torch.randn(8, 8, 16), torch.randn(8, 16, 4), trainable=False)
    with pytest.raises(ConfigError, match="model.trainable=experts"):
        router.before_steps(frozen, lambda p: p, lambda t: t)
    with pytest.raises(ConfigError, match=r"\[0.9, 0.2\] is not a range"):
        make_router("evolve", {"beta": ((0.9, 0.2),)}, SPEC)


def test_frozen_experts_are_refused_in_the_words_of_recipes_and_of_convert():
    from tests.models.stock import converted

    with pytest.raises(
        ConfigError, match="trainable=experts in a recipe, or give trainable='experts'"
    ):
        converted("evolve")
