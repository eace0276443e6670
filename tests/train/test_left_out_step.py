"""Loss and gradients of a step with a bad sample are those of the step without it."""

from __future__ import annotations

import pytest
import torch

from gemoe_ds.data.collate import Collator
from gemoe_ds.data.sample import Turn, open_samples
from gemoe_ds.models.tokenizer import load_tokenizer
from tests.data.turns import cut_image, with_turns
from tests.helpers import run_ranks
from tests.tiny import make_model
from tests.train.resuming import make_config, write_setting

LONGEST = 64
WEIGHTS = {"monotonic_weight": 0.7, "balance_weight": 0.3}
ROUTERS = {"gemoe": WEIGHTS, "ada_k": {"warm_steps": 0, "updates": 2}}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("left out"))


def batches_of(setting, model, *rows_of):
    """A micro-batch of each; "broken" and "long" are bad samples."""
    good = open_samples(setting["data"])
    bad = {
        "broken": cut_image(good[1], 200),
        "long": with_turns(good[2], Turn("a " * LONGEST, "b")),
    }
    collator = Collator(
        load_tokenizer(setting["tokenizer"]),
        model.image_layout,
        model.backbone.chat,
        max_length=LONGEST,
    )
    samples = [[bad.get(row) or good[row] for row in rows] for rows in rows_of]
    return [
        collator.batch([collator.encode_or_leave_out(99, sample) for sample in some])
        for some in samples
    ]


def model_of(setting, router="gemoe"):
    return make_model((setting["hf"], setting["tokenizer"]), router, ROUTERS[router]).train()


@pytest.mark.parametrize("rows", [("broken", 3, 4), (3, "long", 4), (3, 4, "long", "broken")])
def test_a_micro_batch_is_what_it_is_without_them(setting, rows):
    found = []
    model = model_of(setting)
    for some in (rows, (3, 4)):
        (batch,) = batches_of(setting, model, some)
        assert len(batch.bad) == len(some) - 2
        model.zero_grad()
        parts = model(**batch.inputs)
        parts["loss"].backward()
        found.append(({n: v.item() for n, v in parts.items()}, gradients(model)))
    (losses, grads), (wanted, wanted_grads) = found
    assert losses == pytest.approx(wanted, rel=1e-6) and losses["load_balance"] > 0
    for name, grad in wanted_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-7)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.trainable().items()}


def step_on_rank(rank, setting, config, *steps):
    """Loss and other figures after each step of micro-batches of [rank 0, rank 1], and Adam's."""
    from gemoe_ds.engine.build import initialize
    from gemoe_ds.engine.groups import expert_shard
    from gemoe_ds.engine.world import distributed
    from gemoe_ds.engine.zero import full_moment, full_value
    from gemoe_ds.train.trainer import Trainer

    with distributed() as world:
        shard = expert_shard(config.ep_size, world, trainable=False)
        router = config.model.router
        model = make_model(
            (setting["hf"], setting["tokenizer"]), router.name, vars(router.config), shard
        )
        engine = initialize(model.train(), config, world)
        trainer = Trainer(config, model, engine, iter(()), world)
        found = []
        for number, rows in enumerate(steps, 1):
            trainer.timed.append((1, 1.0))
            trainer.train_step(number, batches_of(setting, model, *rows[rank]), collect=True)
            values = trainer._metrics()
            seen = {n: float(v) for n, v in values.items() if torch.as_tensor(v).numel() == 1}
            seen |= {"updates": trainer.updates, "global_steps": engine.global_steps}
            params = {n: full_value(p).clone() for n, p in model.trainable().items()}
            moments = {n: full_moment(engine, p, "exp_avg") for n, p in model.trainable().items()}
            found.append((seen, params, moments))
    return found


def config_of(setting, router):
    options = {"name": router} | ROUTERS[router]
    plain = {"lr": 1e-2, "max_grad_norm": None, "betas": (0.5, 0.9), "schedule": "constant"}
    batch = {"steps": 9, "micro_batch_size": 1, "gradient_accumulation_steps": 2}
    return make_config(setting, setting["root"], model__router=options, optim=plain, train=batch)


def test_a_micro_batch_that_is_left_out_is_in_no_mean(setting):
    """Three of four are left, on two ranks that share the experts."""
    config = config_of(setting, "gemoe")
    rows = ([[3], [4]], [["broken"], [6]])
    ((seen, _, moments),), _ = run_ranks(step_on_rank, 2, setting, config, rows)

    model = model_of(setting)
    batches = batches_of(setting, model, [3], [4], [6])
    targets = sum(batch.num_targets for batch in batches) / 3
    parts = [model(**batch.inputs, targets_per_micro_batch=targets) for batch in batches]
    for name in ("lm", "monotonic", "load_balance"):
        expected = sum(float(part[name]) for part in parts) / 3
        assert seen[f"loss/{name}"] == pytest.approx(expected)
    (sum(part["loss"] for part in parts) / 3).backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(2 * moments[name], grad, rtol=1e-4, atol=1e-7)


def test_an_empty_step_is_none_of_the_updates_of_a_batch(setting):
    """Ada-K makes two updates on a batch; the second of three steps is empty."""
    config = config_of(setting, "ada_k")
    good = ([[3], [4]], [[6], [7]])
    (one, empty, three), _ = run_ranks(
        step_on_rank, 2, setting, config, good, ([["long"], ["broken"]],) * 2, good
    )
    assert [s[0]["updates"] for s in (one, empty, three)] == [2, 2, 4]
    assert [s[0]["global_steps"] for s in (one, empty, three)] == [2, 4, 6]
    assert [s[0]["empty_steps"] for s in (one, empty, three)] == [0, 1, 1]
    assert three[0]["skipped_steps"] == 0 and "loss/lm" not in empty[0]
    for kept in (1, 2):
        assert all(torch.equal(empty[kept][n], one[kept][n]) for n in one[kept])
    assert any(not torch.equal(three[1][n], one[1][n]) for n in one[1])
