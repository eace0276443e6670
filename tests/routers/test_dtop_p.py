"""DTop-p by hand: the prefix of scores, the calibrated start, the controller, the scale."""

from __future__ import annotations

import math

import pytest
import torch

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.router import RoutingSpec
from gemoe_ds.moe.step_context import StepContext
from tests.routers.cases import make_context, make_router, ragged_tokens

SPEC = RoutingSpec(d_model=16, num_experts=8, top_k=4, norm_topk_prob=False)
WIDE = RoutingSpec(d_model=16, num_experts=32, top_k=8, norm_topk_prob=False)


def step(router, number, **sums):
    model = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in sums.items()}
    layer = {name: value * float("nan") for name, value in model.items()}
    router.after_step(StepContext(number, 10, layer, model, None, None, None))


def prefix(p_E, threshold):
    """The experts of one token, worked out one by one."""
    chosen, total = [], 0.0
    for e in sorted(range(len(p_E)), key=lambda e: -p_E[e]):
        chosen.append(e)
        total += p_E[e]
        if total > threshold:
            return sorted(chosen)
    return sorted(chosen)


@pytest.mark.parametrize("threshold", [0.001, 0.4, 0.8, 0.999])
def test_the_fewest_experts_that_exceed_p(threshold):
    router = make_router("dtop_p", {"threshold": threshold}, SPEC)
    z_TE = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * 2
    ctx = make_context(torch.ones(1, 50, dtype=torch.bool))
    decision = router.select(z_TE, torch.randn(50, 16), ctx)
    expected = [prefix(p_E, threshold) for p_E in z_TE.softmax(-1).tolist()]
    assert [row.nonzero().flatten().tolist() for row in decision.mask_TE] == expected
    assert torch.equal(decision.weights_TE, z_TE.softmax(-1))


@pytest.mark.parametrize("target", [1.0, 2.5, 6.0, 20.0])
def test_first_step_calibrates_p(target):
    """Over the tokens of two layers and of two ranks, padding left out, the mean k is met."""
    options = {"target_k": target, "normalize": "none"}
    routers = [make_router("dtop_p", options, WIDE, seed=s).train() for s in (0, 1)]
    batches = [ragged_tokens(seed, WIDE, sequences=40) for seed in range(2)]

    def counts():
        found = []
        for router in routers:
            for x_TD, ctx in batches:
                router(x_TD, ctx)
                found.append(ctx.layers[0].step_counts)
        return {name: sum(c[name] for c in found) for name in found[0]}

    sums = counts()
    for router in routers:
        step(router, 1, **sums)
    assert routers[0].threshold == routers[1].threshold
    after = counts()
    assert after["active"] / after["tokens"] == pytest.approx(target, rel=0.02)


def test_controller_by_hand():
    """p += 0.5 (e - e before) + 0.25 e with e = (4 - k) / 4: k 5, 3, 4 give e -1/4, 1/4, 0."""
    options = {"threshold": 0.5, "proportional": 0.5, "integral": 0.25, "target_k": 4.0}
    router = make_router("dtop_p", options, SPEC)
    p = 0.5
    for number, (k, change) in enumerate([(5, -0.1875), (3, 0.3125), (4, -0.125)], start=1):
        step(router, number, active=20 * k, tokens=20, entering=torch.zeros(1000))
        p += change
        assert math.isclose(router.threshold.item(), p, rel_tol=1e-6)


def test_p_stays_between_0_and_1_and_comes_back_at_once():
    router = make_router("dtop_p", {"threshold": 0.5}, SPEC)
    for k, bound in ((1, 1.0), (8, 0.0)):
        for number in range(2, 300):
            step(router, number, active=k, tokens=1, entering=torch.zeros(1000))
        assert abs(router.threshold.item() - bound) <= 1.001e-4
    step(router, 300, active=1, tokens=1, entering=torch.zeros(1000))
    assert router.threshold > 0.05


@pytest.mark.parametrize("number", [1, 2])
def test_a_step_without_tokens_moves_nothing(number):
    router = make_router("dtop_p", {}, SPEC)
    before = router.threshold.item()
    step(router, number, active=0, tokens=0, entering=torch.zeros(1000))
    assert router.threshold.item() == before


def test_the_loop_holds_its_target_while_gates_change():
    router = make_router("dtop_p", {"target_k": 5.0}, WIDE).train()
    x_TD, ctx = ragged_tokens(0, WIDE, sequences=60)
    found = []
    for number in range(1, 80):
        with torch.no_grad():
            router.scale.log.add_(0.005)  # ever more peaked
        router(x_TD, ctx)
        counts = ctx.layers[0].step_counts
        found.append(counts["active"] / counts["tokens"])
        step(router, number, **counts)
    assert found[0] < 5 and all(abs(k - 5) < 0.6 for k in found[10:])


def test_scale_starts_at_the_backbones_own_scores():
    x_TD, ctx = ragged_tokens(1, SPEC)
    scaled, plain = (make_router("dtop_p", {"normalize": n}, SPEC) for n in ("scale", "none"))
    assert torch.equal(scaled.score(x_TD, ctx), plain.score(x_TD, ctx))


def test_standardised_logits_start_at_the_deviation_of_the_gate():
    router = make_router("dtop_p", {"normalize": "standardise"}, SPEC)
    gate_ED = torch.randn(8, 16)
    router.adopt_gate(gate_ED)
    x_TD, ctx = ragged_tokens(1, SPEC)
    logits_TE = router.score(x_TD, ctx)
    wanted = (gate_ED - gate_ED.mean(0)).square().sum(1).mean().sqrt()
    torch.testing.assert_close(logits_TE.std(1, correction=0), wanted.expand(len(x_TD)))
    torch.testing.assert_close(logits_TE.argsort(1), (x_TD @ gate_ED.T).argsort(1))


@pytest.mark.parametrize("target", [0.5, 8.0])
def test_targets_out_of_reach(target):
    with pytest.raises(ConfigError, match=r"target_k=\S+ must be from 1"):
        make_router("dtop_p", {"target_k": target}, SPEC)
