"""A comparison from records and metrics: written, read back, averaged."""

from __future__ import annotations

import json

import pytest

from experiments.comparison import compare, mean_curve, read_comparison, read_curve
from experiments.comparison_figures import write_comparison_figures
from gemoe_ds.errors import DataError
from tests.experiments.comparisons import comparison, curves, records, row


def test_round_trip_and_figures(tmp_path):
    made = comparison()
    path = tmp_path / "comparison.json"
    path.write_text(made.model_dump_json())
    assert read_comparison(path) == made
    for entry in write_comparison_figures(made, tmp_path / "figures"):
        assert (tmp_path / "figures" / entry.file).stat().st_size > 10_000


def test_mean_curve():
    steps, means = mean_curve(curves(), "loss_S")
    assert steps == (1, 2) and means == [2.5, 1.0]


def test_a_curve_is_read_from_the_metrics(tmp_path):
    lines = [{"step": s, "loss/lm": 1 / s, "mean_k": 5.0, "other": 1} for s in (10, 20)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = read_curve(tmp_path, records()[3])
    assert curve.step_S == (10, 20) and curve.loss_S == (0.1, 0.05) and curve.method == "gemoe"
    with pytest.raises(DataError, match="train it again"):
        read_curve(tmp_path / "nowhere", records()[3])


def test_without_gemoe():
    with pytest.raises(DataError, match="no evaluation of gemoe"):
        compare([row("top_k", 8, 0.8)], [], command="", seconds=0)
