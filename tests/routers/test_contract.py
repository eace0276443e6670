"""What every registered router keeps to, whatever it does: a new one is held to it by its name."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gemoe_ds.checkpoint.state import load_trained
from gemoe_ds.errors import ConfigError
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.moe.dispatch import LocalDispatcher
from gemoe_ds.moe.experts.module import Experts, QuantisedExperts
from gemoe_ds.moe.experts.quantised import QuantisedWeight
from gemoe_ds.moe.layer import MoELayer
from gemoe_ds.moe.router import Router
from gemoe_ds.train.assemble import build_model
from tests.helpers import repository, run_ranks
from tests.routers.cases import (
    SPEC,
    TRAIN,
    VARIANTS,
    all_variants,
    case_id,
    make_context,
    make_router,
    ragged_tokens,
)
from tests.tiny import make_model, random_batch
from tests.train.reloading import is_same_evaluation, train_and_reload
from tests.train.resuming import BOUND, losses, make_config, train_all, write_setting

every_variant = pytest.mark.parametrize("case", all_variants(), ids=case_id)


@every_variant
@pytest.mark.parametrize("seed", range(4))
def test_plan(case, seed):
    """Float32 weights that are finite and not negative, k within its bound, padding left alone."""
    router = make_router(*case)
    for mode in (True, False):
        router.train(mode)
        x_TD, ctx = ragged_tokens(seed)
        decision, logits_TN = router.decide(x_TD.bfloat16(), ctx)
        router.record(decision, logits_TN, ctx)
        width = router.spec.num_experts + len(router.free.kinds if router.free else ())
        shape = (x_TD.shape[0], width)
        assert decision.mask_TE.shape == decision.weights_TE.shape == logits_TN.shape == shape
        assert decision.mask_TE.dtype == torch.bool
        assert decision.weights_TE.dtype == logits_TN.dtype == torch.float32
        used = decision.weights_TE[decision.mask_TE]
        assert torch.isfinite(used).all() and (used >= 0).all()
        assert not decision.mask_TE[~ctx.is_valid_T].any()
        assert router.split(decision.mask_TE)[0].sum(1).max() <= router.max_k
        assert math.isclose(decision.scores_TE.detach().sum(1).min(), 1, rel_tol=1e-4)


@every_variant
def test_padding_changes_nothing(case):
    """Tokens that are not valid may hold anything: choices, outputs, losses, counts, statistics
    and gradients stay."""
    router = make_router(*case).train()
    x_TD, ctx = ragged_tokens(1)
    ctx.collect = True
    experts = Experts(torch.randn(8, 12, 16), torch.randn(8, 16, 6), trainable=True)
    layer = MoELayer(router, experts, LocalDispatcher(), ctx, shared=torch.nn.Linear(16, 16))
    expected = None
    for filling in (0.0, 100.0, 1e30, torch.inf, torch.nan):
        x_TD = torch.where(ctx.is_valid_T[:, None], x_TD.detach(), filling).requires_grad_()
        layer.zero_grad()
        ctx.begin(ctx.is_valid_T[None], ctx.is_vision_T[None])
        y_TD = layer(x_TD[None])[0][ctx.is_valid_T]
        record = ctx.layers[0]
        values = [t.value for t in record.losses.values()]
        total = y_TD.square().sum() + sum(t.value * t.weight for t in record.losses.values())
        total.backward()
        found = [
            y_TD,
            *values,
            *record.step_counts.values(),
            *(s.total for s in record.stats.values()),
        ]
        found += [p.grad for p in [*layer.parameters(), x_TD] if p.grad is not None]
        expected = expected or found
        for first, second in zip(expected, found, strict=True):
            assert torch.isfinite(second).all()
            torch.testing.assert_close(first, second)


@every_variant
def test_experts_in_few_bits_are_those_that_they_stand_for(case):
    """Outputs, losses, and the gradients of the input and of the router; in float64, as processors
    sum float32 in orders of their own."""
    torch.manual_seed(2)
    parts = [QuantisedWeight.of("nf4", torch.randn(8, *shape)) for shape in ((12, 16), (16, 6))]
    numbers = [torch.stack([w.dequantised(e, torch.float64) for e in range(8)]) for w in parts]
    found = []
    for experts in (QuantisedExperts(*parts), Experts(*numbers, trainable=False)):
        router = make_router(*case).train().double()
        x_TD, ctx = ragged_tokens(1)
        x_TD = x_TD.double().requires_grad_()
        y_TD = MoELayer(router, experts, LocalDispatcher(), ctx)(x_TD)
        losses = [term.value for term in ctx.layers[0].losses.values()]
        (y_TD.square().sum() + sum(losses)).backward()
        grads = [p.grad for p in [x_TD, *router.parameters()] if p.grad is not None]
        found.append([y_TD, *losses, *grads])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)


@every_variant
def test_memory_is_asked_for_as_much_as_is_used(case):
    """The mean k at the start of training and of evaluation is no more than the router says."""
    router = make_router(*case, replace(SPEC, num_experts=32))
    x_TD, ctx = ragged_tokens(0, sequences=20, length=50)
    for mode in (True, False):
        plan = router.train(mode)(x_TD, ctx)
        mean_k = plan.token_ids_A.numel() / int(ctx.is_valid_T.sum())
        assert mean_k <= 1.1 * router.peak_mean_k <= 1.1 * router.max_k


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("name", Router.names())
def test_a_backbone_whose_k_is_one(name, norm_topk_prob):
    """Every group of the optimizer has a gradient; or the router says at once that it cannot."""
    try:
        router = make_router(
            name, {}, replace(SPEC, top_k=1, norm_topk_prob=norm_topk_prob)
        ).train()
    except ConfigError as error:
        assert "model.router" in str(error) and "own k is 1" in str(error)
        return
    x_TD, ctx = ragged_tokens(3)
    total = router(x_TD, ctx).weights_A.square().sum()
    total = total + sum(t.value * t.weight for t in ctx.layers[0].losses.values())
    if total.requires_grad:
        total.backward()
    trains = {n: p for n, p in router.named_parameters() if p.requires_grad}
    for group in ({"gate.weight"}, trains.keys() - {"gate.weight"}):
        grads = [trains[n].grad for n in group & trains.keys()]
        assert not grads or any(g is not None and g.any() for g in grads), group


@every_variant
def test_no_token_at_all(case):
    """Only padding, and an empty batch: finite losses, and a gradient for every parameter."""
    for tokens in (0, 5):
        router = make_router(*case).train()
        ctx = make_context(torch.zeros(1, tokens, dtype=torch.bool))
        plan = router(torch.randn(tokens, 16), ctx)
        assert plan.token_ids_A.numel() == 0
        total = plan.weights_A.sum() + sum(
            t.value * t.weight for t in ctx.layers[0].losses.values()
        )
        assert torch.isfinite(total)
        if total.requires_grad:
            total.backward()
        for name, parameter in router.named_parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


def loss_and_grads(model, seed=3, **kwargs):
    batch = random_batch(seed, batch=3)
    model.train()
    torch.manual_seed(0)
    rolled_out = model(**batch, roll_out=True) if model.rollouts else None
    loss = model(**batch, rolled_out=rolled_out)["loss"]
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.trainable().items()}


@every_variant
def test_gradients_survive_activation_checkpointing_and_evaluation_draws_nothing(case, base):
    train = TRAIN.get(case[0], "routers")
    model = make_model(base, *case, train=train)
    plain = loss_and_grads(model)
    again = loss_and_grads(make_model(base, *case, train=train, activation_checkpointing=True))
    torch.testing.assert_close(again[0], plain[0])
    for name, grad in plain[1].items():
        assert grad is not None, f"{name} trains and has no gradient"
        assert torch.isfinite(grad).all(), name
        torch.testing.assert_close(again[1][name], grad, msg=name)
    assert any(grad.any() for grad in plain[1].values())
    model.eval()
    batch = random_batch(5)
    state = torch.get_rng_state()
    with torch.no_grad():
        first, second = (model(**batch)["lm"] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def runs_of(name: str, options: dict, setting, root) -> dict[str, object]:
    """One rank as the reference; two that share the experts; two under ZeRO 3 from its middle."""

    def config(output, ep_size, zero, **changes):
        return make_config(
            setting,
            root / f"{case_id((name, options))}-{output}",
            model__router={"name": name, **options},
            model__trainable=TRAIN.get(name, "routers"),
            optim={"lr": 1e-2, "eps": 1e-3, "warmup_steps": 1},
            train={"steps": 6, "micro_batch_size": 1, "global_batch_size": 4},
            parallel__ep_size=ep_size,
            deepspeed=str(repository() / f"ds_configs/zero{zero}.json"),
            **changes,
        )

    middle = root / f"{case_id((name, options))}-shared/checkpoints/step-000003"
    return {
        "alone": config("alone", 1, 0),
        "shared": config("shared", 2, 2),
        "resumed": config("resumed", 1, 3, resume=str(middle)),
    }


def _is_trained(item: pytest.Item) -> bool:
    return "trained" in getattr(item, "fixturenames", ()) and item.path == Path(__file__)


# One variant of each: the one with the most that must survive.
MOST_STATE = {"dynmoe": "scores", "ada_k": "default", "top_p": "layer", "gemoe": "both"}
TRAINED = [
    (name, VARIANTS[name][MOST_STATE[name]] if name in MOST_STATE else {})
    for name in Router.names()
]


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    """Every router that is asked for, trained in each of the ways of `runs_of`."""
    root = tmp_path_factory.mktemp("contract")
    setting = write_setting(root)
    asked = {i.callspec.params["name"] for i in request.session.items if _is_trained(i)}
    runs = {
        name: runs_of(name, options, setting, root) for name, options in TRAINED if name in asked
    }
    shared, resumed, alone = (
        [of[way] for of in runs.values()] for way in ("shared", "resumed", "alone")
    )
    found, *_ = run_ranks(train_and_reload, 2, shared, resumed, timeout=280)
    assert run_ranks(train_all, 1, alone, timeout=200) == [None]
    return setting, runs, dict(zip(runs, found, strict=True))


@pytest.mark.parametrize("name", Router.names())
def test_training_over_ranks_equals_one(trained, name):
    """EP 2 and ZeRO 2 give the losses of one process; ZeRO 3 goes on from their checkpoint."""
    of = {way: losses(Path(config.output_dir)) for way, config in trained[1][name].items()}
    assert sorted(of["alone"]) == [1, 2, 3, 4, 5, 6] and sorted(of["resumed"]) == [4, 5, 6]
    for way in ("shared", "resumed"):
        for step, loss in of[way].items():
            assert math.isclose(loss, of["alone"][step], rel_tol=BOUND), (way, step)


@pytest.mark.parametrize("name", Router.names())
def test_what_trains_moves_and_all_state_is_stored(trained, name):
    _, runs, found = trained
    config = runs[name]["shared"]
    model = build_model(config, ExpertShard())
    stored = load_trained(Path(config.output_dir) / "checkpoints/step-000006")
    assert set(stored) == set(model.trainable()) | set(model.router_state())
    assert not found[name].still, "these train and have not moved"
    assert all(torch.isfinite(tensor).all() for tensor in stored.values())


@pytest.mark.parametrize("name", Router.names())
def test_a_checkpoint_is_the_trained_model(trained, name):
    """A fresh model with the checkpoint put in scores and routes as the one that was trained."""
    is_same_evaluation(trained[2][name])


@pytest.mark.slow
@pytest.mark.parametrize("name", Router.names())
def test_two_hundred_steps(name, tmp_path):
    """No NaN, no hang, nothing that trains stands still, on two ranks that share the experts; and
    the checkpoint reloads to the same evaluation."""
    setting = write_setting(tmp_path)
    config = make_config(
        setting,
        tmp_path / "run",
        model__router={"name": name},
        model__trainable=TRAIN.get(name, "routers"),
        parallel__ep_size=2,
        train={"steps": 200, "micro_batch_size": 2},
        checkpoint={"every": 0, "keep": 1},
        deepspeed=str(repository() / "ds_configs/zero2.json"),
    )
    (found,), *_ = run_ranks(train_and_reload, 2, [config], timeout=600)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    values = [json.loads(line) for line in lines]
    assert values[-1]["step"] == 200 and values[-1]["skipped_steps"] == 0
    assert all(math.isfinite(line["loss/total"]) for line in values)
    assert not found.still, "these train and have not moved"
    assert not found.not_finite
    is_same_evaluation(found)
