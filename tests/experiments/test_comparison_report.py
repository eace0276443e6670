"""The report of a comparison says what is in the records: tables and conclusions."""

from __future__ import annotations

from experiments.comparison import compare
from experiments.comparison_report import render_comparison, verdicts
from tests.experiments.comparisons import comparison, curves, records


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
