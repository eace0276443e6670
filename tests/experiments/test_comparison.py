"""The comparison says what is in the records: tables, verdicts, figures."""

from __future__ import annotations

import json

import pytest

from experiments.comparison import Curve, compare, mean_curve, read_comparison, read_curve
from experiments.comparison_figures import training, write_comparison_figures
from experiments.comparison_report import render_comparison, verdicts
from gemoe_ds.errors import DataError
from tests.analysis.evaluations import record


def row(method, k, mean, mean_k=None, seed=0, **changed):
    per_layer = (k, k) if mean_k is None else (mean_k - 0.5, mean_k + 0.5)
    scores = {"count": mean - 0.1, "fact": mean + 0.1}
    return record(method, k, scores, mean_k_per_layer=per_layer, seed=seed, **changed)


def records(gemoe=0.8, adamoe=0.7, mono_0=0.6, reversed_=0.5):
    return [
        row("top_k", 8, 0.8),
        row("top_k", 4, 0.6),
        row("top_k_tuned", 8, 0.85),
        row("gemoe", None, gemoe - 0.01, 5.0),
        row("gemoe", None, gemoe + 0.01, 5.0, seed=1),
        row("adamoe", None, adamoe, 4.5),
        row("ltdr", None, 0.88, 8.5),
        row("gemoe_mono_0", None, mono_0, 4.5),
        row("gemoe_reversed", None, reversed_, 4.2),
        row("gemoe", None, 0.7, 3.03, budget_k=3.0),
        row("gemoe_budget_6", None, 0.82, 6.12),
    ]


def curves():
    return [
        Curve(method="gemoe", k=None, seed=s, step_S=(1, 2), loss_S=(2 + s, 1), mean_k_S=(5, 4))
        for s in (0, 1)
    ]


def comparison(**scores):
    return compare(records(**scores), curves(), command="make compare", seconds=60)


def test_gemoe_ahead_of_those_with_as_few_experts():
    made = comparison()
    assert [g.method for g in made.rivals()] == ["gemoe", "adamoe"], "LTDR uses more"
    first, second = verdicts(made)
    assert first.startswith("**GeMoE has the best average") and "LTDR 88.00 at 8.50" in first
    assert second.startswith("The ablations fall in the paper's order")


def test_what_did_not_come_out_is_said():
    first, second = verdicts(comparison(adamoe=0.9, mono_0=0.85))
    assert "AdaMoE has a better average than GeMoE" in first
    assert second.startswith("**The ablations do not fall in the paper's order**")


def test_report_has_every_table():
    text = render_comparison(comparison())
    first, second, third = (text.split(f"## {t}")[1] for t in ("Methods", "Static k", "Ablations"))
    assert "AdaMoE" in first.split("##")[0] and "without L_mono" not in first.split("##")[0]
    assert "Top-4" in second.split("##")[0] and "AdaMoE" not in second.split("##")[0]
    assert "negative" in third and "gemoe_budget" not in text
    budgets = text.split("other budgets")[1]
    table = [[cell.strip() for cell in line.split("|")[1:6]] for line in budgets.splitlines()]
    assert ["3", "after training", "3.03", "1.0", "70.00"] in table, "off by one percent"
    assert ["6", "in training", "6.12", "2.0", "82.00"] in table


def test_gemoe_alone_is_not_called_the_best():
    alone = [record for record in records() if record.method.startswith(("top_k", "gemoe"))]
    (ablations,) = verdicts(compare(alone, curves(), command="", seconds=0))
    assert ablations.startswith("The ablations")


def test_round_trip_and_figures(tmp_path):
    made = comparison()
    path = tmp_path / "comparison.json"
    path.write_text(made.model_dump_json())
    assert read_comparison(path) == made
    for entry in write_comparison_figures(made, tmp_path / "figures"):
        assert (tmp_path / "figures" / entry.file).stat().st_size > 10_000


def test_every_curve_of_the_training_figure_has_a_look_of_its_own():
    """Also where methods are more than colours."""
    names = ["gemoe", "adamoe", "ada_k", "dynmoe", "evomoe", "ltdr", "moepp", "remoe", "top_p"]
    rows = [row("top_k", 8, 0.8)] + [row(name, None, 0.7, 4.0) for name in names]
    drawn = [
        Curve(method=name, k=None, seed=0, step_S=(1, 2), loss_S=(2, 1), mean_k_S=(5, 4))
        for name in names
    ]
    figure = training(compare(rows, drawn, command="", seconds=0))
    lines = figure.axes[0].get_lines()
    looks = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines}
    assert len(lines) == len(looks) == len(names)


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
