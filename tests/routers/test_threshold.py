"""Threshold by hand: which experts pass, where the number comes from, and who holds a mean k."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.step_context import StepContext
from tests.routers.cases import SPEC, at_slot, make_context, make_router, ragged_tokens


def trained_on(router, logits_TE, valid_T=None):
    """The router after one step on such logits."""
    valid_T = torch.ones(len(logits_TE), dtype=torch.bool) if valid_T is None else valid_T
    ctx = make_context(valid_T[None])
    router.train().select(logits_TE, torch.zeros(len(logits_TE), 16), ctx)
    counts = router.step_counts(None, ctx)
    router.after_step(StepContext(1, 10, counts, counts, None, None, None))
    return router.eval()


def mean_k(router, logits_TE, ctx=None):
    ctx = ctx or make_context(torch.ones(1, len(logits_TE), dtype=torch.bool))
    return router.select(logits_TE, torch.zeros(len(logits_TE), 16), ctx).mask_TE.sum(1).float()


def random_logits(seed, tokens=4000, scale=1.5):
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("renormalises", [False, True])
@pytest.mark.parametrize("k_low, wanted", [(1, 1.5), (1, 3.3), (0, 0.7), (2, 2.5)])
def test_one_number_gives_the_mean_k_that_is_asked_for(renormalises, k_low, wanted):
    """The experts are those whose weight is at least the number that sorting all weights gives."""
    spec = replace(SPEC, norm_topk_prob=renormalises)
    logits_TE = random_logits(0)
    router = make_router("threshold", {"mean_k": wanted, "k_low": k_low}, spec)
    trained_on(router, logits_TE)
    decision = router.select(
        logits_TE, torch.zeros(4000, 16), make_context(torch.ones(1, 4000) > 0)
    )
    best_TK = logits_TE.softmax(-1).sort(descending=True).values[:, :4]
    if renormalises:
        best_TK = best_TK / best_TK.sum(-1, keepdim=True)
    best_TK[:, :k_low] = 1.0
    number = best_TK.flatten().sort(descending=True).values[round(wanted * 4000) - 1]
    expected_T = (best_TK >= number).sum(1)
    k_T = decision.mask_TE.sum(1)
    assert k_T.float().mean().item() == pytest.approx(wanted, rel=0.005)
    assert (k_T != expected_T).float().mean() < 0.02  # within a bin of the histogram


def test_before_the_first_step_every_token_gets_all():
    router = make_router("threshold", {}).eval()
    assert mean_k(router, random_logits(1)).unique().tolist() == [4]


@pytest.mark.parametrize("wanted, k", [(0.5, 1), (1.0, 1), (4.0, 4), (9.0, 4)])
def test_beyond_the_range_of_k(wanted, k):
    router = trained_on(make_router("threshold", {"mean_k": wanted}), random_logits(2))
    assert mean_k(router, random_logits(3)).unique().tolist() == [k]


def test_sequences_draw_their_mean_k_and_layers_share_it():
    logits_TE = random_logits(4, tokens=6400)
    valid = torch.ones(64, 100, dtype=torch.bool)
    ctx = make_context(valid, layers=2)
    options = {"edge": 0, "importance": False}
    routers = [make_router("threshold", options, at_slot(SPEC, slot)) for slot in (1, 0)]
    for router in routers:
        router.scores_H = trained_on(make_router("threshold", options), logits_TE).scores_H
    state = torch.get_rng_state()
    found = [mean_k(router.train(), logits_TE, ctx).view(64, 100).mean(1) for router in routers]
    assert not torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(found[0], found[1])
    wanted_S = ctx.layers[0].cache["mean_k_T"].view(64, 100)[:, 0].float()
    assert wanted_S.min() < 1.6 and wanted_S.max() > 3.9
    assert (found[0] - wanted_S).abs().max() < 0.5 and (found[0] - wanted_S).abs().mean() < 0.1


@pytest.mark.parametrize("renormalises", [False, True])
def test_the_edge_teaches_the_gate_and_changes_no_output(renormalises):
    """All k_high are computed. The weights are those without an edge; their gradient is that of
    weight * sigmoid((log p - log threshold) / edge), the weight and the threshold as they are."""
    spec = replace(SPEC, norm_topk_prob=renormalises)
    logits_TE = random_logits(9, tokens=60).requires_grad_()
    valid_T = torch.ones(60, dtype=torch.bool)
    gradients, hard_TE = [], None
    for edge in (0.0, 0.7):
        options = {"edge": edge, "train_mean_k": (2.0, 2.0), "importance": False}
        router = trained_on(make_router("threshold", options, spec), random_logits(10)).train()
        decision = router.select(logits_TE, None, make_context(valid_T[None]))
        used_TE = torch.where(decision.mask_TE, decision.weights_TE, 0.0)
        out_TE = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
        gradients += torch.autograd.grad((used_TE * out_TE).sum(), logits_TE)
        if edge:
            torch.testing.assert_close(used_TE, hard_TE)
            assert decision.mask_TE.sum(1).unique().tolist() == [4]
        hard_TE = used_TE.detach()
    assert 1.8 < (hard_TE > 0).sum(1).float().mean() < 2.2
    scores_TE = logits_TE.softmax(-1)
    mask_TE = scores_TE >= scores_TE.topk(4).values[:, 3:]
    whole_T1 = (scores_TE * mask_TE).sum(1, keepdim=True) if renormalises else 1.0
    log_threshold = router._log_threshold(make_context(valid_T[None]))[0].float()
    soft_TE = (((scores_TE / whole_T1).log() - log_threshold) / 0.7).sigmoid()
    weights_TE = (
        (scores_TE / (scores_TE * (hard_TE > 0)).sum(1, keepdim=True))
        if renormalises
        else scores_TE
    )
    more = torch.autograd.grad((weights_TE.detach() * soft_TE * mask_TE * out_TE).sum(), logits_TE)
    torch.testing.assert_close(gradients[1] - gradients[0], more[0])


def test_padding_does_not_count():
    logits_TE = random_logits(5)
    valid_T = torch.rand(4000, generator=torch.Generator().manual_seed(0)) < 0.5
    shifted_TE = torch.where(valid_T[:, None], logits_TE, logits_TE * 0)
    kept = trained_on(make_router("threshold", {}), logits_TE[valid_T])
    padded = trained_on(make_router("threshold", {}), shifted_TE, valid_T)
    torch.testing.assert_close(kept.scores_H, padded.scores_H)
    router = trained_on(make_router("threshold", {"hold": True}), logits_TE)
    ctx = make_context(valid_T[None])
    mean_k(router, shifted_TE, ctx)
    assert ctx.memory["fresh_H"].sum() == 4 * valid_T.sum()


def test_the_histogram_runs_and_is_of_all_layers():
    router = make_router("threshold", {"memory": 0.75})
    first, second = torch.zeros(320), torch.zeros(320)
    first[100], second[200] = 8.0, 2.0
    for counts in (first, second, torch.zeros(320)):
        layer = {"scores_H": torch.rand(320)}
        router.after_step(StepContext(1, 10, layer, {"scores_H": counts}, None, None, None))
    assert router.scores_H[[100, 200]].tolist() == [0.75, 0.25]
    assert router.scores_H.sum().item() == 1


@pytest.mark.parametrize("tokens", [5, 50, 1000])
def test_hold_meets_a_mean_k_where_the_scores_are_others(tokens):
    """Flatter scores than those of training, in prefills and a few tokens at a time."""
    other_TE = random_logits(6, tokens=3000, scale=0.5)
    found = {}
    for hold in (False, True):
        options = {"mean_k": 3.0, "hold": hold, "hold_tokens": 500}
        router = trained_on(make_router("threshold", options), random_logits(7))
        ctx = make_context(torch.ones(1, tokens, dtype=torch.bool))
        ks = []
        for some_TE in other_TE.split(tokens):
            ctx.begin(None, torch.zeros(1, tokens, dtype=torch.bool))
            ks.append(mean_k(router, some_TE, ctx))
        found[hold] = torch.cat(ks)[-1500:].mean().item()
    assert abs(found[False] - 3.0) > 0.3
    assert abs(found[True] - 3.0) < 0.1


def test_evaluation_leaves_what_was_trained():
    router = trained_on(make_router("threshold", {"hold": True}), random_logits(8))
    before = router.scores_H.clone()
    for seed in range(3):
        x_TD, ctx = ragged_tokens(seed)
        router(x_TD, ctx)
    assert torch.equal(router.scores_H, before)


def test_importance_is_a_factor_on_the_scores_of_a_token():
    """k by sorting score times factor over all tokens; the order within a token stays."""
    logits_TE, x_TD = random_logits(12), torch.randn(4000, 16)
    router = make_router("threshold", {"mean_k": 2.0, "k_low": 0, "importance_limit": 2.0})
    with torch.no_grad():
        router.importance.map.weight.normal_(generator=torch.Generator().manual_seed(0))
        router.importance.bias.fill_(0.3)
    valid_T = torch.ones(4000, dtype=torch.bool)
    ctx = make_context(valid_T[None])
    router.train().select(logits_TE, x_TD, ctx)
    counts = router.step_counts(None, ctx)
    router.after_step(StepContext(1, 10, counts, counts, None, None, None))
    mask_TE = router.eval().select(logits_TE, x_TD, make_context(valid_T[None])).mask_TE
    raw_T = x_TD @ router.importance.map.weight[0] + 0.3
    factor_T = (2.0 * (raw_T / 2.0).tanh()).exp().detach()
    best_TK, order_TK = logits_TE.softmax(-1).topk(4)
    compared_TK = best_TK * factor_T[:, None]
    number = compared_TK.flatten().sort(descending=True).values[2 * 4000 - 1]
    expected_TE = torch.zeros_like(mask_TE).scatter(1, order_TK, compared_TK >= number)
    assert (mask_TE != expected_TE).float().mean() < 0.005  # within a bin of the histogram
    assert mask_TE.sum(1).float().mean().item() == pytest.approx(2.0, rel=0.01)


def test_a_token_that_does_not_matter_leaves_its_experts_to_the_others():
    """A loss that reads half of the tokens: on the others only the share that is used acts."""
    x_TD = torch.randn(400, 16, generator=torch.Generator().manual_seed(1))
    is_read_T = x_TD[:, 0] > 0
    router = make_router("threshold", {"train_mean_k": (2.0, 2.0), "importance_weight": 0.2})
    trained_on(router, random_logits(13)).train()
    optimizer = torch.optim.Adam(router.importance.parameters(), lr=0.1)
    value_E = torch.rand(8, generator=torch.Generator().manual_seed(2)) + 1
    for step in range(60):
        logits_TE = random_logits(14 + step, tokens=400)
        ctx = make_context(torch.ones(1, 400, dtype=torch.bool))
        decision = router.select(logits_TE, x_TD, ctx)
        gain_T = (decision.weights_TE * decision.mask_TE) @ value_E
        used = router.losses(decision, logits_TE, ctx)["used"]
        optimizer.zero_grad()
        (used.weight * used.value - (gain_T * is_read_T).mean()).backward()
        assert router.gate.weight.grad is None
        optimizer.step()
        counts = router.step_counts(decision, ctx)
        router.after_step(StepContext(step, 60, counts, counts, None, None, None))
    router.eval().mean_k = 2.0
    ctx = make_context(torch.ones(1, 400, dtype=torch.bool))
    k_T = router.select(random_logits(99, tokens=400), x_TD, ctx).mask_TE.sum(1).float()
    assert k_T[is_read_T].mean() > k_T[~is_read_T].mean() + 1
    assert k_T.mean().item() == pytest.approx(2.0, abs=0.3)


def test_importance_needs_an_edge():
    with pytest.raises(ConfigError, match="edge=0: nothing would teach .*importance=false"):
        make_router("threshold", {"edge": 0})


@pytest.mark.parametrize("given", [(0.0, 3.0), (3.0, 2.0), (2.0, 4.5)])
def test_a_range_that_cannot_be_drawn_from(given):
    with pytest.raises(ConfigError, match=r"train_mean_k=\[.*k_high"):
        make_router("threshold", {"train_mean_k": given})


def test_hold_is_of_all_layers_and_moves_between_forwards():
    """Two layers with scores of their own share the number, which both meet in the mean."""
    options = {"mean_k": 2.5, "hold": True, "hold_tokens": 200}
    routers = [make_router("threshold", options, at_slot(SPEC, slot)).eval() for slot in (0, 1)]
    ctx, found = make_context(torch.ones(1, 100, dtype=torch.bool), layers=2), []
    for step in range(8):
        ctx.begin(None, torch.zeros(1, 100, dtype=torch.bool))
        of_layers = []
        for slot, router in enumerate(routers):
            logits_TE = random_logits(10 * step + slot, tokens=100, scale=1.0 + slot)
            of_layers.append(mean_k(router, logits_TE, ctx).mean())
            assert ctx.memory["fresh_H"].sum() == (slot + 1) * 400
        found.append(torch.stack(of_layers))
    assert found[0].tolist() == [4, 4]  # nothing was known yet, not even from training
    mean_L = torch.stack(found[2:]).mean(0)
    assert abs(mean_L.mean() - 2.5) < 0.1 and abs(mean_L[0] - mean_L[1]) > 0.2


def test_a_copy_begins_anew():
    ctx = make_context(torch.ones(1, 4000, dtype=torch.bool))
    mean_k(make_router("threshold", {"hold": True}).eval(), random_logits(11), ctx)
    assert ctx.memory and not copy.deepcopy(ctx).memory
