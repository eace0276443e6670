"""Sums over micro-batches and ranks, and what is written of them."""

from __future__ import annotations

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gemoe_ds.moe.context import Stat
from gemoe_ds.train.monitor import METRICS, Monitor, StatSum


def test_a_mean_is_over_what_was_counted_and_a_sum_over_all():
    stats = StatSum()
    stats.add("mean_k", Stat(torch.tensor(6.0), count=2.0))
    stats.add("mean_k", Stat(torch.tensor(3.0), count=torch.tensor(4)))
    stats.add("load", Stat(torch.tensor([1.0, 0.0]), "sum"))
    stats.add("load", Stat(torch.tensor([2.0, 5.0]), "sum"))
    stats.add("of nothing", Stat(torch.tensor(0.0), count=0.0))
    two_ranks = lambda packed: packed.mul_(2)  # noqa: E731
    values = stats.reduced(two_ranks, torch.device("cpu"))
    assert values.keys() == {"mean_k", "load"}
    assert values["mean_k"] == 1.5 and values["load"].tolist() == [6, 10]
    assert stats.reduced(two_ranks, torch.device("cpu")) == {}, "a fresh start"


def test_numbers_are_written_as_they_are(tmp_path):
    monitor = Monitor(tmp_path, 0, tensorboard=True)
    monitor.write(3, {"lr/router": 3e-4, "k_histogram": torch.tensor([0.0, 4.0, 1.0])})
    monitor.close()
    (line,) = map(json.loads, (tmp_path / METRICS).read_text().splitlines())
    assert line == {"step": 3, "lr/router": 3e-4, "k_histogram": [0, 4, 1]}
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (scalar,) = board.Scalars("lr/router")
    assert scalar.step == 3 and scalar.value == pytest.approx(3e-4)
    (histogram,) = [event.histogram_value for event in board.Histograms("k_histogram")]
    assert list(histogram.bucket_limit) == [0.5, 1.5, 2.5] and list(histogram.bucket) == [0, 4, 1]
    assert (histogram.num, histogram.sum, histogram.sum_squares) == (5, 6, 8)


def test_a_lost_stretch_is_dropped_and_a_cut_line_too(tmp_path):
    first = Monitor(tmp_path, 0, tensorboard=False)
    for step in range(1, 5):
        first.write(step, {"loss": float(step)})
    first.close()
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"step": 5, "lo')
    second = Monitor(tmp_path, 2, tensorboard=False)
    second.write(3, {"loss": 9.0})
    second.close()
    lines = map(json.loads, (tmp_path / METRICS).read_text().splitlines())
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1), (2, 2), (3, 9)]
