"""Ada-K by hand: warm start, sampled k, advantages, PPO's loss, and a reward that it learns."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe import losses
from gemoe_ds.moe.context import Rollout
from gemoe_ds.moe.router import RoutingSpec
from tests.routers.cases import make_context, make_router

SPEC = RoutingSpec(d_model=4, num_experts=4, top_k=2, norm_topk_prob=False)
TOKENS = 6


def made(**options):
    router = make_router("ada_k", {"warm_steps": 0} | options, SPEC).train()
    return (
        router,
        torch.randn(TOKENS, 4),
        make_context(torch.ones(2, TOKENS // 2, dtype=torch.bool)),
    )


def roll_out(router, x_TD, ctx, reward_T, is_scored_T):
    """Both passes with the given gain of the sampled k over the default."""
    kept = {}
    for name in router.rollouts():
        ctx.rollout = name
        with torch.no_grad():
            router(x_TD, ctx)
        kept[name] = dict(ctx.layers[0].cache)
        ctx.layers[0].cache.clear()
    ctx.rollout = None
    zeros = torch.zeros_like(reward_T)
    ctx.rolled_out = {
        "sampled": Rollout(reward_T, is_scored_T, [kept["sampled"]]),
        "default": Rollout(zeros, is_scored_T, [kept["default"]]),
    }
    return kept["sampled"]


def test_sampled_k_is_replayed_and_the_default_is_the_backbone_s():
    router, x_TD, ctx = made()
    ctx.rollout = "default"
    assert router(x_TD, ctx).token_ids_A.bincount().tolist() == [2] * TOKENS
    ctx.rollout = None
    everywhere = torch.ones(TOKENS, dtype=torch.bool)
    sampled = roll_out(router, x_TD, ctx, torch.ones(TOKENS), everywhere)
    plan = router(x_TD, ctx)
    assert plan.token_ids_A.bincount().tolist() == (sampled["choice_T"] + 1).tolist()


def test_without_advantage_only_the_regulariser_has_a_gradient():
    router, x_TD, ctx = made()
    everywhere = torch.ones(TOKENS, dtype=torch.bool)
    roll_out(router, x_TD, ctx, torch.zeros(TOKENS), everywhere)
    router(x_TD, ctx)
    terms = ctx.layers[0].losses
    (policy,) = torch.autograd.grad(
        terms["policy"].value, router.allocator.weight, retain_graph=True
    )
    (regulariser,) = torch.autograd.grad(terms["expected_k"].value, router.allocator.weight)
    assert not policy.any() and regulariser.any()
    assert terms["expected_k"].weight == 3e-3


def test_ppo_by_hand():
    router, x_TD, ctx = made(gamma=0.5)
    reward = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, 0.0])
    scored = torch.tensor([True, True, False, True, False, False])
    old = roll_out(router, x_TD, ctx, reward, scored)
    with torch.no_grad():
        router.allocator.weight.add_(torch.randn_like(router.allocator.weight) * 0.5)
    router(x_TD, ctx)
    log_p = (x_TD @ router.allocator.weight.t()).log_softmax(-1)
    advantage = [1.0, -2.0, -0.5, 3.0, 3.0, 3.0]  # no target: the mean of the sequence's targets
    total = 0.0
    for t in range(TOKENS):
        ratio = math.exp(log_p[t, old["choice_T"][t]].item() - old["log_p_T"][t].item())
        clipped = min(max(ratio, 0.8), 1.2)
        total += min(ratio * advantage[t], clipped * advantage[t])
    value = ctx.layers[0].losses["policy"].value.item()
    assert math.isclose(value, -total / TOKENS, rel_tol=1e-4)  # the last layer: no discount


@pytest.mark.parametrize("slot, discount", [(0, 0.25), (1, 0.5), (2, 1.0)])
def test_lower_layers_have_a_discount(slot, discount):
    """A gain of 1 everywhere, before the first update: every ratio is 1."""
    options = {"warm_steps": 0, "gamma": 0.5, "regulariser": 0.0}
    router = make_router("ada_k", options, replace(SPEC, slot=slot)).train()
    ctx = make_context(torch.ones(2, TOKENS // 2, dtype=torch.bool), layers=3)
    x_TD, kept = torch.randn(TOKENS, 4), {}
    for name in router.rollouts():
        ctx.rollout = name
        with torch.no_grad():
            router(x_TD, ctx)
        kept[name] = [dict(record.cache) for record in ctx.layers]
    ctx.rollout, scored_T = None, torch.ones(TOKENS, dtype=torch.bool)
    gains = {"sampled": torch.ones(TOKENS), "default": torch.zeros(TOKENS)}
    ctx.rolled_out = {n: Rollout(gain, scored_T, kept[n]) for n, gain in gains.items()}
    router(x_TD, ctx)
    value = ctx.layers[slot].losses["policy"].value.item()
    assert value == pytest.approx(-discount)


def test_warm_start_gives_the_mass_that_holds_the_default_k():
    router, x_TD, ctx = made(warm_steps=1)
    assert router.rollouts() == ()
    plan = router(x_TD, ctx)
    assert plan.token_ids_A.bincount().tolist() == [2] * TOKENS
    scores = (x_TD @ router.gate.weight.t()).softmax(-1)
    wanted = router._warm_k(scores, ctx.is_valid_T)
    assert abs(wanted.float().mean() - 2) <= 0.5 and wanted.unique().numel() > 1
    log_p = (x_TD @ router.allocator.weight.t()).log_softmax(-1)
    expected = -log_p.gather(1, wanted[:, None] - 1).mean()
    torch.testing.assert_close(ctx.layers[0].losses["warm"].value, expected)
    router.warm_left.zero_()
    assert router.rollouts() == ("sampled", "default")


@pytest.mark.parametrize("bits", [2.5, 3.8])  # mean entropy of a peaked and of a flat backbone
@pytest.mark.parametrize(
    "options, mean",
    [({"k_high": None}, 8), ({"k_high": 8}, 8), ({"k_high": 4}, 4)]
    + [({"k_high": 8, "warm_mean_k": 3.0}, 3)],
)
def test_warm_labels_are_found_on_counts_that_are_cut_afterwards(bits, options, mean):
    spec = RoutingSpec(d_model=4, num_experts=64, top_k=8, norm_topk_prob=False)
    router = make_router("ada_k", options, spec)
    scores_TE = scores_like_a_model_s(bits)
    valid_T = torch.arange(400) % 5 > 0
    before_TE = scores_TE.sort(descending=True).values.cumsum(1)[:, :-1]  # of all but the first

    def counts(p):  # how many it takes until the better ones hold p
        return [1 + sum(b < p for b in row) for row in before_TE.tolist()]

    labels_T = router._warm_k(scores_TE, valid_T)
    low, high = 0.0, 1.0
    for _ in range(10):  # the oracle: token after token
        middle = (low + high) / 2
        kept = [n for n, valid in zip(counts(middle), valid_T.tolist(), strict=True) if valid]
        low, high = (low, middle) if sum(kept) / len(kept) > mean else (middle, high)
    most = options["k_high"] or 64
    assert labels_T.tolist() == [min(n, most) for n in counts((low + high) / 2)]
    assert labels_T.bincount().max() < 0.6 * 400, "they vary"
    assert losses.spearman(losses.entropy_bits(scores_TE), labels_T) > 0.9


def scores_like_a_model_s(bits):
    """[400, 64], of mean entropy `bits`: tokens are sure or unsure, as in the demo's backbones."""
    torch.manual_seed(1)
    scale_T1 = 2 ** torch.empty(400, 1).uniform_(-0.7, 0.7)
    logits_TE = torch.randn(400, 64) * scale_T1
    factor = {2.5: 3.1, 3.8: 2.0}[bits]
    scores_TE = (logits_TE * factor).softmax(1)
    assert abs(losses.entropy_bits(scores_TE).mean() - bits) < 0.2
    return scores_TE


@pytest.mark.parametrize(
    "options, said",
    [
        (
            {"warm_mean_k": 5.0, "k_high": 4},
            "warm_mean_k=5 must be above k_low=1 and at most k_high=4",
        ),
        (
            {"warm_mean_k": 2.0, "k_low": 2},
            "warm_mean_k=2 must be above k_low=2 and at most k_high=4",
        ),
        ({"warm_mean_k": 2.0, "warm_top_p": 0.3}, "warm_top_p=0.3 and warm_mean_k=2 both set"),
    ],
)
def test_a_warm_up_without_a_choice_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        make_router("ada_k", options, SPEC)


def test_at_inference_the_most_likely_k():
    router, x_TD, ctx = made()
    plan = router.eval()(x_TD, ctx)
    expected = (x_TD @ router.allocator.weight.t()).argmax(1) + 1
    assert plan.token_ids_A.bincount().tolist() == expected.tolist()


def test_it_learns_what_is_rewarded():
    """Tokens of one kind are rewarded for k = 1, those of the other for k = 4."""
    router, _, _ = made(regulariser=0.0, credit="token")
    torch.manual_seed(1)
    kind = torch.arange(64) % 2
    x_TD = torch.randn(64, 4) * 0.1
    x_TD[:, 0] += torch.where(kind == 0, 1.0, -1.0)
    ctx = make_context(torch.ones(1, 64, dtype=torch.bool))
    everywhere = torch.ones(64, dtype=torch.bool)
    optimizer = torch.optim.AdamW(router.allocator.parameters(), lr=0.05, weight_decay=0)
    for _ in range(60):
        kept = roll_out(router, x_TD, ctx, torch.zeros(64), everywhere)
        k = kept["choice_T"] + 1
        reward = torch.where(kind == 0, 2.0 - k, k - 3.0)
        ctx.rolled_out["sampled"] = Rollout(reward, everywhere, [kept])
        for _ in range(2):
            router(x_TD, ctx)
            optimizer.zero_grad()
            ctx.layers[0].losses["policy"].value.backward()
            optimizer.step()
    ctx.rolled_out = {}
    k = router.eval()(x_TD, ctx).token_ids_A.bincount(minlength=64)
    assert k[kind == 0].float().mean() < 1.2 and k[kind == 1].float().mean() > 3.8


def test_without_a_choice_there_is_nothing_to_learn():
    with pytest.raises(ConfigError, match="k_low=2, k_high=2 leave no k to choose"):
        make_router("ada_k", {"k_low": 2, "k_high": 2}, SPEC)


def test_the_warm_up_lasts_its_steps_whatever_the_updates():
    assert make_router("ada_k", {"warm_steps": 3, "updates": 2}).warm_left == 6
