"""A budget is met by one shift or one factor for the whole model."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from gemoe_ds.errors import ConfigError
from gemoe_ds.evaluation.budget import TOLERANCE, fit_budget_to
from gemoe_ds.moe.router import Router, RoutingSpec
from tests.routers.cases import make_context, make_router

TOKENS = 4000
SPEC = RoutingSpec(d_model=16, num_experts=64, top_k=8, norm_topk_prob=False)


def model(layers=3, name="gemoe", **options):
    """Routers whose expected k differ from layer to layer, and the k of all tokens."""
    routers = [make_router(name, options, SPEC, seed=layer) for layer in range(layers)]
    for layer, router in enumerate(routers):
        with torch.no_grad():
            (router.eap if name == "gemoe" else router.gate).weight.mul_(1 + 2 * layer)
    x_TD = torch.randn(TOKENS, 16)
    ctx = make_context(torch.ones(1, TOKENS, dtype=torch.bool))

    def k_LT():
        with torch.no_grad():
            return torch.stack([r.decide(x_TD, ctx)[0].mask_TE.sum(1) for r in routers])

    return routers, k_LT


def mean_k_L(k_LT):
    return k_LT().double().mean(1).tolist()


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("target", [1.5, 3.0, 4.0, 6.2, 7.5])
def test_target_is_met(target, rescale):
    routers, k_LT = model()
    found = fit_budget_to(routers, target, lambda: mean_k_L(k_LT), rescale=rescale)
    assert k_LT().double().mean().item() == pytest.approx(target, rel=TOLERANCE)
    assert found.mean_k == pytest.approx(target, rel=TOLERANCE) and found.passes <= 12
    assert found.options == {o: tuple(getattr(r, o) for r in routers) for o in found.options}
    (k_scale,), (k_shift,) = (set(values) for values in found.options.values())
    assert (k_scale == 1) != rescale and (k_shift == 0) == rescale
    assert str(found) == f"model.router.k_scale={k_scale:.6g} model.router.k_shift={k_shift:.6g}"


def test_tokens_and_layers_keep_their_order():
    routers, k_LT = model()
    before = k_LT()
    fit_budget_to(routers, 3.0, lambda: mean_k_L(k_LT))
    after = k_LT()
    assert (after <= before).all()
    for first, second in zip(before, after, strict=True):
        order = first.argsort(stable=True)
        grouped = [second[first == k].double().mean() for k in first.unique()]
        assert grouped == sorted(grouped) and order.numel() == TOKENS


@pytest.mark.parametrize("target", [0.5, 1.0, 8.0, 9.0])
def test_out_of_reach(target):
    routers, k_LT = model()
    with pytest.raises(ConfigError, match="k goes from 1 to 8"):
        fit_budget_to(routers, target, lambda: mean_k_L(k_LT))


@pytest.mark.parametrize("rescale, other", [(False, "try --rescale"), (True, "no --rescale")])
def test_a_miss_is_no_success(rescale, other):
    """A predictor that gives every token 4.5: all of them get 4, or all get 5."""
    routers, k_LT = model()
    for router in routers:
        torch.nn.init.zeros_(router.eap.weight)
    with pytest.raises(ConfigError, match=rf"--mean-k 4.4 is not met: [45] is .*{other}"):
        fit_budget_to(routers, 4.4, lambda: mean_k_L(k_LT), rescale=rescale)
    assert fit_budget_to(routers, 4.0, lambda: mean_k_L(k_LT), rescale=rescale).mean_k == 4


def test_the_nearest_of_all_passes_is_taken():
    """Not the last: k is rounded, so that a later try may be worse."""
    routers, _ = model()
    mean_ks, tried = iter([3.03, *[5.0, 1.0] * 7]), []

    def measure() -> list[float]:
        tried.append(routers[0].k_shift)
        return [next(mean_ks)] * 3

    found = fit_budget_to(routers, 3.0, measure)
    assert found.mean_k == pytest.approx(3.03) and found.passes == 15
    assert {r.k_shift for r in routers} == set(found.options["k_shift"]) == {tried[0]}
    assert tried[-1] != tried[0]


@pytest.mark.parametrize("rescale", [False, True])
def test_what_was_set_before_is_forgotten(rescale):
    """A recipe's numbers, or those of an earlier budget: the one that is found stands alone."""
    fresh, k_LT = model()
    expected = fit_budget_to(fresh, 3.0, lambda: mean_k_L(k_LT), rescale=rescale)
    routers, _ = model(k_scale=2.0, k_shift=-1.5)
    for router, other in zip(routers, fresh, strict=True):
        router.load_state_dict(other.state_dict())
    fresh[:] = routers  # k_LT's own list
    assert fit_budget_to(routers, 3.0, lambda: mean_k_L(k_LT), rescale=rescale) == expected


def test_other_routers_have_nothing_to_move():
    with pytest.raises(ConfigError, match="'top_k' has no number .* works for .*gemoe.* score"):
        fit_budget_to([make_router("top_k", {})], 3.0, lambda: [4.0])
    with pytest.raises(ConfigError, match="'score' has no k_scale; leave --rescale out"):
        fit_budget_to([make_router("score", {})], 3.0, lambda: [4.0], rescale=True)


@pytest.mark.parametrize("name", ["gemoe", "score"])
def test_every_layer_meets_its_own_target(name):
    """A list of numbers, which a recipe takes as it is printed."""
    routers, k_LT = model(name=name)
    targets = [2.5, 4.0, 3.0]
    found = fit_budget_to(routers, targets, lambda: mean_k_L(k_LT))
    assert mean_k_L(k_LT) == pytest.approx(targets, rel=TOLERANCE)
    assert found.mean_k == pytest.approx(sum(targets) / 3, rel=TOLERANCE)
    dial = Router.named(name).dial
    text = str(found).split(f"{dial}=")[1]
    values = tuple(json.loads(text))
    assert values == pytest.approx(found.options[dial], rel=1e-5) and len(set(values)) == 3
    again = [
        make_router(name, {dial: values}, replace(SPEC, slot=slot, num_layers=3))
        for slot in range(3)
    ]
    assert [getattr(r, dial) for r in again] == list(values)
    with pytest.raises(ConfigError, match=f"{dial}: 2 values for 3 MoE layers; give one for each"):
        make_router(name, {dial: values[:2]}, replace(SPEC, num_layers=3))


@pytest.mark.parametrize("seed", range(4))
def test_a_layer_is_found_though_those_below_still_move(seed):
    """What a layer gets depends on the numbers of those below it, as in a model."""
    g = torch.Generator().manual_seed(seed)
    steep_L = (15 + 45 * torch.rand(27, generator=g)).tolist()
    sign_L = (torch.rand(27, generator=g) - 0.5).sign().tolist()
    routers = [make_router("score", {}, SPEC) for _ in range(27)]

    def measure() -> list[float]:
        k_L, below = [], 0.0
        for router, steep, sign in zip(routers, steep_L, sign_L, strict=True):
            passing = router.threshold * steep * math.exp(2 * sign * below)
            k_L.append(1 + 7 * math.exp(-passing))
            below = 0.7 * below + 0.3 * (k_L[-1] / 8 - 0.5)
        return k_L

    fit_budget_to(routers, [3.0] * 27, measure)
    assert measure() == pytest.approx([3.0] * 27, rel=0.02)


@pytest.mark.parametrize("monotonic_weight", [0.1, 0.0])
def test_training_loss_pulls_the_model_to_its_budget(monotonic_weight):
    """The mean over layers goes to 3, with the monotonic loss, which keeps the order, and alone."""
    routers, _ = model(budget_k=3.0, monotonic_weight=monotonic_weight)
    for slot, router in enumerate(routers):
        router.spec = RoutingSpec(16, 64, 8, False, slot)
    x_TD = torch.randn(500, 16)
    ctx = make_context(torch.ones(1, 500, dtype=torch.bool), layers=3)
    params = [p for r in routers for p in r.eap.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=0.05, weight_decay=0)
    for _ in range(150):
        for router in routers:
            router(x_TD, ctx)
        terms = ctx.mean_losses()
        assert len([r for r in ctx.layers if "budget" in r.losses]) == 1, "one budget for all"
        sum(t.weight * t.value for t in terms.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    mean_k = sum(r.predict_k(x_TD).mean() for r in routers) / 3
    assert mean_k.item() == pytest.approx(3.0, abs=0.1)
