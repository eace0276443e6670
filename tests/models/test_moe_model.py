"""Losses, predictions and what trains of a converted model, against values from its parts."""

from __future__ import annotations

import pytest
import torch

from gemoe_ds.errors import ConfigError
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.models.tiny.backbone import TinyBackbone
from tests.tiny import make_model, random_batch, stock_logits


def test_loss_is_the_mean_cross_entropy_of_the_targets(base):
    batch = random_batch(4)
    model = make_model(base, "top_k", {"balance_weight": 0.0})
    logits = stock_logits(base, batch)[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels_BS"][:, 1:].flatten())
    parts = model(**batch)
    torch.testing.assert_close(parts["lm"], expected)
    torch.testing.assert_close(parts["loss"].detach(), parts["lm"])


def test_total_loss_is_eq_13(base):
    model = make_model(base, "gemoe", {"monotonic_weight": 0.5, "balance_weight": 0.25})
    parts = model(**random_batch(5))
    total = parts["lm"] + 0.5 * parts["monotonic"] + 0.25 * parts["load_balance"]
    torch.testing.assert_close(parts["loss"].detach(), total)


def test_only_routers_and_predictors_train(base):
    model = make_model(base, "gemoe")
    assert {n.split(".mlp.")[1] for n in model.trainable()} == {
        "router.gate.weight",
        "router.eap.weight",
    }
    assert len(model.trainable()) == 2 * len(model.moe_layers) == 4


def test_predictions_mark_correct_targets(base):
    batch = random_batch(6)
    model = make_model(base, "top_k").eval()
    best = stock_logits(base, batch).argmax(-1)
    target = batch["labels_BS"] != -100
    target[:, 0] = False
    expected = torch.zeros_like(target)
    expected[:, 1:] = (best[:, :-1] == batch["labels_BS"][:, 1:]) & target[:, 1:]
    assert torch.equal(model(**batch, score=True)["correct_BS"], expected)


@pytest.mark.parametrize("router", ["top_k", "gemoe", "dynmoe", "moepp", "ada_k"])
def test_recomputation_leaves_the_records_alone(base, router):
    """A loss of a layer's second run would hold that run's graph, and all its activations."""
    model = make_model(base, router, activation_checkpointing=True).train()
    loss = model(**random_batch(7))["loss"]
    records = list(model.ctx.layers)
    losses = [dict(record.losses) for record in records]
    loss.backward()
    for now, record, before in zip(model.ctx.layers, records, losses, strict=True):
        assert now is record and before
        assert all(now.losses[name] is term for name, term in before.items())


def test_bfloat16_stores_frozen_weights_low_and_trains_in_float32(base):
    model = make_model(base, dtype=torch.bfloat16)
    kinds = {p.requires_grad: p.dtype for p in model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert model.moe_layers[0].experts.gate_up_EGD.dtype == torch.bfloat16
    reference = make_model(base)(**random_batch(9))
    parts = model(**random_batch(9))
    assert abs(parts["loss"] - reference["loss"]) < 0.05 * reference["loss"]
    parts["loss"].backward()
    assert all(p.grad.dtype == torch.float32 for p in model.trainable().values())


def test_activated_parameters_count_only_visited_experts(base):
    model = make_model(base)
    per_expert = 3 * 16 * 8
    total = sum(
        p.numel()
        for p in Backbone.named("tiny")(TinyBackbone.Config()).load(base[0], base[1]).parameters()
    )
    assert model.num_parameters == total
    assert model.activated_parameters([8.0, 8.0]) == total
    assert model.activated_parameters([4.0, 2.5]) == total - round((4 + 5.5) * per_expert)


def test_ep_size_must_divide_the_experts(base):
    with pytest.raises(ConfigError, match="ep_size=3 does not divide the backbone's 8 experts"):
        make_model(base, shard=ExpertShard(0, 3))
