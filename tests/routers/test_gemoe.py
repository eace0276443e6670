"""GeMoE by hand, and every switch of its ambiguities."""

from __future__ import annotations

import math

import pytest
import torch

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe import losses
from gemoe_ds.moe.context import TokenContext
from gemoe_ds.moe.linear import RouterLinear
from gemoe_ds.moe.router import RoutingSpec
from gemoe_ds.moe.step_context import StepContext
from gemoe_ds.routers.gemoe import GeMoERouter
from tests.routers.cases import make_context, make_router

SPEC = RoutingSpec(d_model=4, num_experts=4, top_k=3, norm_topk_prob=False)


def make(tokens=3, spec=SPEC, **options):
    torch.manual_seed(0)
    router = GeMoERouter(GeMoERouter.Config(**options), spec)
    ctx = TokenContext(1)
    ctx.begin(torch.ones(1, tokens, dtype=torch.bool), torch.zeros(1, tokens, dtype=torch.bool))
    return router, ctx


def set_k(router, *choices):
    """Make the predictor answer choice i for the unit vector e_i."""
    with torch.no_grad():
        router.eap.weight.zero_()
        for token, choice in enumerate(choices):
            router.eap.weight[choice - router.k_low, token] = 100.0


def test_three_tokens_by_hand():
    router, ctx = make()
    with torch.no_grad():
        router.gate.weight.copy_(
            torch.tensor([[3.0, 0, 0, 0], [2, 5, 0, 0], [1, 0, 1, 0], [0, 4, 0, 0]])
        )
    set_k(router, 2, 1, 3)
    x = torch.eye(4)[:3]
    plan = router(x, ctx)
    p = (x @ router.gate.weight.t()).softmax(-1)
    # token 0 takes experts 0 and 1; token 1 expert 1; token 2 expert 2 and two equal ones
    chosen = {(t, e) for e, t in _assignments(plan)}
    assert {(0, 0), (0, 1), (1, 1), (2, 2)} <= chosen and len(chosen) == 6
    for (e, t), weight in zip(_assignments(plan), plan.weights_A, strict=True):
        assert math.isclose(weight.item(), p[t, e].item(), rel_tol=1e-6)  # raw scores, Eq. 2


def _assignments(plan):
    experts = torch.repeat_interleave(torch.arange(plan.num_experts), plan.tokens_per_expert_E)
    return list(zip(experts.tolist(), plan.token_ids_A.tolist(), strict=True))


def test_expected_k_and_rounding_half_to_even():
    router, ctx = make(k_low=1, k_high=4)
    with torch.no_grad():
        router.eap.weight.zero_()  # uniform over 1..4: 2.5 -> 2
    x = torch.randn(3, 4)
    torch.testing.assert_close(router.predict_k(x), torch.full((3,), 2.5))
    assert router(x, ctx).tokens_per_expert_E.sum() == 3 * 2


def test_fresh_predictor_is_near_the_middle_but_not_constant():
    """facts A4, A5: 16 untrained predictors of width 2048 round to 4.52 on average."""
    spec = RoutingSpec(2048, 64, 8, False)
    means = []
    for seed in range(16):
        torch.manual_seed(seed)
        router = GeMoERouter(GeMoERouter.Config(), spec)
        k = router.predict_k(torch.randn(256, 2048)).round()
        assert k.unique().numel() > 1
        means.append(k.mean().item())
    assert abs(sum(means) / 16 - 4.5) < 0.2


def test_cross_entropy_has_no_gradient_to_the_predictor_by_default():
    for switch, reaches in (("none", False), ("soft_mask", True)):
        router, ctx = make(ce_to_k=switch)
        x = torch.randn(3, 4)
        plan = router(x, ctx)
        grad = torch.autograd.grad(plan.weights_A.sum(), router.eap.weight, allow_unused=True)[0]
        assert (grad is not None and bool(grad.any())) == reaches


def test_soft_mask_changes_no_value():
    x = torch.randn(3, 4)
    plans = []
    for switch in ("none", "soft_mask"):
        router, ctx = make(ce_to_k=switch)
        plans.append(router(x, ctx))
    torch.testing.assert_close(plans[0].weights_A, plans[1].weights_A)
    assert plans[0].token_ids_A.tolist() == plans[1].token_ids_A.tolist()


def _monotonic(router, ctx, x):
    router(x, ctx)
    return ctx.layers[0].losses["monotonic"].value


def test_entropy_guides_but_is_not_trained():
    x = torch.randn(3, 4)
    for detach in (True, False):
        router, ctx = make(detach_entropy=detach)
        grad = torch.autograd.grad(
            _monotonic(router, ctx, x), router.gate.weight, allow_unused=True
        )[0]
        assert (grad is None) == detach


def test_detach_x_keeps_the_loss_out_of_lower_layers():
    for detach in (False, True):
        router, ctx = make(detach_x=detach)
        x = torch.randn(3, 4, requires_grad=True)
        grad = torch.autograd.grad(_monotonic(router, ctx, x), x, allow_unused=True)[0]
        assert (grad is None) == detach


def test_margins_and_correlation():
    x = torch.randn(3, 4)
    values = {}
    for name, options in {
        "default": {},
        "none": {"margin_per_bit": 0.0},
        "constant": {"margin_per_bit": 0.0, "margin_constant": 0.5},
        "reversed": {"correlation": "negative"},
    }.items():
        router, ctx = make(**options)
        values[name] = _monotonic(router, ctx, x)
        h = -(router.score(x, ctx).softmax(-1) * router.score(x, ctx).log_softmax(-1)).sum(
            -1
        ) / math.log(2)
        h = -h if name == "reversed" else h
        k = router.predict_k(x)
        slope, constant = options.get("margin_per_bit", 1.2), options.get("margin_constant", 0.0)
        pairs = [(i, j) for i in range(3) for j in range(3) if h[i] > h[j]]
        hinges = [
            max(0, (slope * (h[i] - h[j]) + constant - (k[i] - k[j])).item()) for i, j in pairs
        ]
        assert math.isclose(values[name].item(), sum(hinges) / len(pairs), rel_tol=1e-5)
    assert len({round(v.item(), 6) for v in values.values()}) == 4


def test_padding_enters_nothing():
    router, ctx = make(tokens=4)
    x = torch.randn(4, 4)
    ctx.begin(torch.tensor([[True, True, True, False]]), torch.zeros(1, 4, dtype=torch.bool))
    padded = router(x, ctx)
    with_padding = {n: t.value for n, t in ctx.layers[0].losses.items()}
    ctx.begin(torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool))
    plain = router(x[:3], ctx)
    for name, term in ctx.layers[0].losses.items():
        torch.testing.assert_close(term.value, with_padding[name])
    assert padded.token_ids_A.tolist() == plain.token_ids_A.tolist()


def test_k_low_zero_allows_tokens_without_experts():
    router, ctx = make(k_low=0)
    set_k(router, 0, 0, 0)
    assert router(torch.eye(4)[:3], ctx).token_ids_A.numel() == 0


def test_norm_topk_prob_switch():
    x = torch.randn(3, 4)
    router, ctx = make(norm_topk_prob="sum")
    plan = router(x, ctx)
    sums = torch.zeros(3).index_add(0, plan.token_ids_A, plan.weights_A.detach())
    torch.testing.assert_close(sums, torch.ones(3))


@pytest.mark.parametrize(
    "options", [{"k_low": 4, "k_high": 3}, {"k_high": 5}, {"k_low": 3, "k_high": 3}]
)
def test_impossible_range_is_refused(options):
    with pytest.raises(ConfigError, match="k_low"):
        make(**options)


def test_without_monotonic_loss_the_predictor_does_not_train():
    router, _ = make(monotonic_weight=0.0)
    assert not router.eap.weight.requires_grad
    assert make()[0].eap.weight.requires_grad


@pytest.mark.parametrize("weight, trains", [(1.0, True), (0.0, False)])
def test_a_budget_alone_trains_the_predictor(weight, trains):
    router, ctx = make(monotonic_weight=0.0, budget_k=2.0, budget_weight=weight)
    assert router.eap.weight.requires_grad == trains
    if trains:
        router(torch.randn(3, 4), ctx)
        ctx.layers[0].losses["budget"].value.backward()
        assert router.eap.weight.grad.any()


def test_statistics():
    router, ctx = make()
    ctx.collect = True
    ctx.is_vision_T = torch.tensor([True, False, False])
    set_k(router, 2, 1, 3)
    router(torch.eye(4)[:3], ctx)
    stats = ctx.layers[0].stats
    assert stats["k_histogram_image"].total.tolist() == [0, 0, 1, 0]
    assert stats["k_histogram_text"].total.tolist() == [0, 1, 0, 1]
    assert stats["mean_k"].total / stats["mean_k"].count == 2
    assert stats["tokens_per_expert"].total.sum() == 6


def test_k_is_rounded_and_the_budget_counts_valid_tokens():
    """A predictor without an opinion expects 2.5; of the second token, padding, it is sure of 4."""
    spec = RoutingSpec(d_model=2, num_experts=4, top_k=4, norm_topk_prob=False)
    router = make_router("gemoe", {"budget_k": 2.0, "k_shift": 0.2}, spec)
    with torch.no_grad():
        router.eap.weight.zero_()[3, 0] = 50.0
    ctx = make_context(torch.tensor([[True, False]]))
    logits_TE, x_TD = torch.zeros(2, 4), torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    decision = router.select(logits_TE, x_TD, ctx)
    assert decision.mask_TE.sum(1).tolist() == [3, 4]
    assert router.losses(decision, logits_TE, ctx)["budget"].value.item() == pytest.approx(0.25)


def step(router, ctx, number=1):
    counts = {n: t.double() for n, t in ctx.layers[0].step_counts.items()}
    router.after_step(StepContext(number, 10, counts, counts, None, None, None))


def scores_of(tokens, experts=16, seed=0):
    torch.manual_seed(seed)
    return (torch.randn(tokens, experts) * torch.rand(tokens, 1) * 6).softmax(1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k_low, k_high", [(1, 8), (0, 5), (3, 4), (1, 16)])
def test_k_rises_with_the_entropy_whatever_the_weights(seed, k_low, k_high):
    """Eqs. 9 and 10 by hand with W_a x = k slope (H - mean H) + b_k; and it never falls."""
    spec = RoutingSpec(8, 16, 4, False)
    router, _ = make(spec=spec, predictor_input="entropy", k_low=k_low, k_high=k_high)
    torch.manual_seed(seed)
    with torch.no_grad():
        router.entropy_map.log_slope.normal_(std=2)
        router.entropy_map.bias_K.normal_(std=3)
        router.mean_entropy.normal_(2.0)
    scores_TE = scores_of(50, seed=seed)
    x_TD = torch.full((50, 8), math.nan)  # the token itself is not read
    k_T = router.predict_k(x_TD, scores_TE).tolist()
    slope, bias = router.entropy_map.log_slope.exp().item(), router.entropy_map.bias_K.tolist()
    found = []
    for p, k in zip(scores_TE.tolist(), k_T, strict=True):
        h = -sum(q * math.log2(q) for q in p if q > 0) - router.mean_entropy.item()
        logits = [n * slope * h + b for n, b in enumerate(bias)]
        powers = [math.exp(z - max(logits)) for z in logits]
        expected = sum((k_low + n) * q for n, q in enumerate(powers)) / sum(powers)
        assert k == pytest.approx(expected, abs=1e-3)
        found.append((h, k))
    ks = [k for _, k in sorted(found)]
    assert all(b >= a - 1e-4 for a, b in zip(ks, ks[1:], strict=False))


def test_the_middle_k_moves_to_the_mean_entropy_of_the_first_step():
    spec = RoutingSpec(8, 16, 8, False)
    router = make_router("gemoe", {"predictor_input": "entropy"}, spec).train()
    valid = torch.arange(60)[None] < 40
    ctx = make_context(valid)
    x_TD = torch.randn(60, 8) * 3
    for number in (1, 2):
        router(x_TD, ctx)
        step(router, ctx, number)
    p = (x_TD @ router.gate.weight.t()).softmax(1)[:40]
    entropy = -(p * p.log2()).sum(1)
    torch.testing.assert_close(router.mean_entropy, entropy.mean())
    k_T = router.predict_k(x_TD, (x_TD @ router.gate.weight.t()).softmax(1))[:40]
    assert k_T.mean().item() == pytest.approx(4.5, abs=0.1)
    # one expert a bit near the middle
    near = (entropy - entropy.mean()).abs() < 0.3
    torch.testing.assert_close(
        (k_T - 4.5)[near], (entropy - entropy.mean())[near], atol=0.02, rtol=0
    )
    router(x_TD * 2, ctx)
    assert ctx.layers[0].step_counts == {}, "later steps do not move it"


@pytest.mark.parametrize("predictor_input", ["token", "entropy", "both"])
@pytest.mark.parametrize("correlation, sign", [("positive", 1), ("negative", -1)])
def test_the_monotonic_loss_trains_every_predictor(predictor_input, correlation, sign):
    """And what it has learned holds for tokens of another kind, where it reads the entropy alone.

    In training two dimensions of x go with the sureness of the gate, elsewhere another one does.
    """
    spec = RoutingSpec(16, 16, 8, False)
    options = {"predictor_input": predictor_input, "correlation": correlation}
    router = make_router("gemoe", options, spec).train()
    torch.manual_seed(3)

    def tokens(dimension):
        sure_T1 = torch.rand(200, 1) * 4
        x_TD = torch.randn(200, 16) * sure_T1
        x_TD[:, :3] = torch.randn(200, 3)
        x_TD[:, dimension] = 3 * (sure_T1[:, 0] - 2)
        return x_TD

    ctx = make_context(torch.ones(1, 200, dtype=torch.bool))
    trained = [p for n, p in router.named_parameters() if not n.startswith("gate")]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0)
    for number in range(40):
        router(tokens(0), ctx)
        loss = ctx.layers[0].losses["monotonic"].value
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in trained)
        assert router.gate.weight.grad is None, "entropy guides, and is not trained"
        optimizer.step()
        if number == 0:
            step(router, ctx)

    def agreement(x_TD):
        scores_TE = (x_TD @ router.gate.weight.t()).softmax(1).detach()
        k_T = router.predict_k(x_TD, scores_TE)
        return sign * losses.spearman(losses.entropy_bits(scores_TE), k_T.detach()).item()

    inside, outside = agreement(tokens(0)), agreement(tokens(1))
    assert inside > 0.7
    if predictor_input == "entropy":
        assert inside > 0.999 and outside > 0.999
    if predictor_input == "token":
        assert outside < 0.6


def test_the_faithful_predictor_draws_and_holds_nothing_more():
    """Its state and its first weights are those of before `predictor_input`."""
    router, _ = make(predictor_input="token")
    assert list(router.state_dict()) == ["gate.weight", "eap.weight"]
    torch.manual_seed(0)
    gate, eap = RouterLinear(4, 4), RouterLinear(4, 3)
    assert torch.equal(router.gate.weight, gate.weight) and torch.equal(
        router.eap.weight, eap.weight
    )
    x_TD, scores_TE = torch.randn(5, 4), scores_of(5, 4)
    q_TK = eap(x_TD).softmax(-1)
    assert torch.equal(router.predict_k(x_TD, scores_TE), q_TK @ torch.arange(1.0, 4.0))
