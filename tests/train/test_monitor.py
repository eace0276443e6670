"""Sums over micro-batches and ranks."""

from __future__ import annotations

import torch

from gemoe_ds.moe.context import Stat
from gemoe_ds.train.monitor import METRICS, StatSum, seconds_in


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


def test_seconds_of_a_run_whose_last_line_a_crash_has_cut(tmp_path):
    assert seconds_in(tmp_path) is None
    lines = ['{"step": 1, "throughput/seconds": 2.0}', '{"step": 2, "throughput/seconds": 0.5}']
    (tmp_path / METRICS).write_text("\n".join(lines) + '\n{"step": 3, "throu')
    assert seconds_in(tmp_path) == 2.5
