"""What is derived from the statistics of the routers, by hand."""

from __future__ import annotations

import torch

from gemoe_ds.moe.context import Stat, TokenContext
from gemoe_ds.moe.metrics import derived, layer_stats


def test_loads_become_numbers_and_the_layers_have_a_mean_k():
    values = {
        "loss/lm": torch.tensor(3.0),
        "mean_k/layer_00": torch.tensor(2.0),
        "mean_k/layer_01": torch.tensor([5.0]),
        "mean_k_image/layer_01": torch.tensor(9.0),
        "tokens_per_expert/layer_00": torch.tensor([6.0, 0.0, 1.0, 1.0]),
        "tokens_per_expert/layer_01": torch.zeros(4),
    }
    assert derived(values) == {
        "loss/lm": 3,
        "mean_k/layer_00": 2,
        "mean_k/layer_01": 5,
        "mean_k_image/layer_01": 9,
        "load_max_over_mean/layer_00": 3,
        "idle_experts/layer_00": 1,
        "load_max_over_mean/layer_01": 0,
        "idle_experts/layer_01": 4,
        "mean_k": 3.5,
    }
    assert "mean_k" not in derived({"data/left_out": torch.tensor(2.0)}), "of an empty step"


def test_a_statistic_is_named_by_its_layer():
    ctx = TokenContext(2)
    ctx.layers[1].stats["mean_k"] = Stat(torch.tensor(6.0), count=3.0)
    assert dict(layer_stats(ctx)) == {"mean_k/layer_01": ctx.layers[1].stats["mean_k"]}
