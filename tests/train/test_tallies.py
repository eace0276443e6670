"""What routers count in a step, by hand."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from gemoe_ds.train.tallies import Tallies


def context(*layers: dict) -> SimpleNamespace:
    tensors = [{name: torch.tensor(value) for name, value in tally.items()} for tally in layers]
    return SimpleNamespace(layers=[SimpleNamespace(tally=tally) for tally in tensors])


def test_sums_over_micro_batches_ranks_and_layers():
    """Here another rank has counted nine times as much."""
    tallies = Tallies(2)
    tallies.add(context({"tokens": 3, "chosen_E": [1, 2]}, {"tokens": 3}))
    tallies.add(context({"tokens": 4, "chosen_E": [0, 5]}, {"tokens": 1}))
    layers, model = tallies.reduced(lambda packed: packed.mul_(10))
    assert layers[0]["tokens"] == 70 and layers[0]["chosen_E"].tolist() == [10, 70]
    assert {n: v.tolist() for n, v in layers[1].items()} == {"tokens": 40}
    assert {n: v.tolist() for n, v in model.items()} == {"tokens": 110, "chosen_E": [10, 70]}
    assert tallies.reduced(lambda packed: packed) == ([{}, {}], {}), "a fresh start"
