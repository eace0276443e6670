"""What routers count in a step, by hand."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from gemoe_ds.moe.step_counts import StepCounts


def context(*layers: dict) -> SimpleNamespace:
    tensors = [
        {name: torch.tensor(value) for name, value in step_counts.items()} for step_counts in layers
    ]
    return SimpleNamespace(
        layers=[SimpleNamespace(step_counts=step_counts) for step_counts in tensors]
    )


def test_sums_over_micro_batches_ranks_and_layers():
    """Here another rank has counted nine times as much."""
    step_counts = StepCounts(2)
    step_counts.add(context({"tokens": 3, "chosen_E": [1, 2]}, {"tokens": 3}))
    step_counts.add(context({"tokens": 4, "chosen_E": [0, 5]}, {"tokens": 1}))
    layers, model = step_counts.reduced(lambda packed: packed.mul_(10))
    assert layers[0]["tokens"] == 70 and layers[0]["chosen_E"].tolist() == [10, 70]
    assert {n: v.tolist() for n, v in layers[1].items()} == {"tokens": 40}
    assert {n: v.tolist() for n, v in model.items()} == {"tokens": 110, "chosen_E": [10, 70]}
    assert step_counts.reduced(lambda packed: packed) == ([{}, {}], {}), "a fresh start"
