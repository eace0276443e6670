"""The report and the terminal's table from literal rows, compared as text."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemoe_ds.analysis.report import render_report, terminal_table
from gemoe_ds.analysis.results import FigureFile, Results, build_results
from tests.analysis.evaluations import ablation_of, gains, pairs_of, record

EXPECTED = Path(__file__).with_name("expected_report.md")


@pytest.fixture
def results() -> Results:
    """Two layers, two kinds (one with a Markdown character in its name), two seeds of GeMoE."""
    gemoe = {
        "mean_k_vision": 4.0,
        "mean_k_text": None,
        "activated_parameters": 350_000,
        "total_parameters": 2_001_000,
        "train_seconds": 3600.0,
        "spearman_per_layer": (0.95, 0.9996),
        "load_max_over_mean_per_layer": (3.0, None),
        "idle_experts_per_layer": (2, 4),
        "mean_k_per_layer": (4, 6),
    }
    made = build_results(
        [
            record("top_k", 8, {"count": 0.9, "a|b": 0.7}),
            record("top_k", 2, {"count": 0.5, "a|b": 0.3}),
            record("top_k_tuned", 5, {"count": 0.86, "a|b": 0.7}, train_seconds=65.4),
            record("gemoe", None, {"count": 0.9, "a|b": 0.68}, seed=0, **gemoe),
            record("gemoe", None, {"count": 0.9, "a|b": 0.72}, seed=1, **gemoe),
        ],
        command="make demo",
    )
    shown = (FigureFile(file="mean_k_per_layer.png", caption="Mean k."),)
    meta = made.meta.model_copy(update={"figures": shown})
    return made.model_copy(update={"meta": meta})


def test_the_report_is_the_expected_text(results: Results) -> None:
    assert render_report(results) == EXPECTED.read_text(encoding="utf-8")


def test_the_terminal_table_is_aligned_plain_ascii(results: Results) -> None:
    lines = terminal_table(results).splitlines()
    assert terminal_table(results).isascii()
    assert len({len(line) for line in lines}) == 1  # every line ends in its last number
    assert lines[0].split() == (
        "Method a|b count Average Questions Mean k Activated M Retention % Sparsity %".split()
    )
    assert lines[2].split() == "Top-8 70.0 90.0 80.00 80.00 8.00 0.400 100.00 0.0".split()
    assert lines[3].split() == "Top-2 30.0 50.0 40.00 40.00 2.00 0.400 50.00 75.0".split()
    assert lines[4].split() == "Top-5, tuned 70.0 86.0 78.00 78.00 5.00 0.400 97.50 37.5".split()
    assert lines[5] == (
        "GeMoE (2 seeds)  70.0 +- 2.8  90.0 +- 0.0  80.00 +- 1.41  80.00 +- 1.41  "
        "5.00 +- 0.00  0.350 +- 0.000  100.00 +- 1.77  37.5 +- 0.0"
    )


def test_a_narrow_terminal_sees_no_kinds_but_all_else(results: Results) -> None:
    wide = terminal_table(results, 1000)
    assert wide == terminal_table(results)
    narrow = terminal_table(results, 100).splitlines()
    assert narrow[0].split() == (
        "Method Average Questions Mean k Activated M Retention % Sparsity %".split()
    )
    assert narrow[2].split() == "Top-8 80.00 80.00 8.00 0.400 100.00 0.0".split()


def test_every_number_comes_from_the_results(results: Results) -> None:
    """Other numbers in, other numbers out: nothing is remembered or built in."""
    rows = tuple(
        row.model_copy(update={"retention": 12.34, "sparsity": 56.7, "backbone_k": 8})
        for row in results.rows
    )
    text = render_report(results.model_copy(update={"rows": rows}))
    assert "keeps 12.34 % of Top-8's accuracy at 56.7 % expert sparsity" in text
    assert "100.00" not in text


def only(**changed: object) -> str:
    """The headline of a single GeMoE seed beside top-8."""
    base = record("top_k", 8, {"fact": 0.8})
    values = {"mean_k_per_layer": (4, 6)} | changed
    made = build_results([base, record("gemoe", None, {"fact": 0.79}, **values)], command="")
    return render_report(made).splitlines()[2]


def test_a_layer_with_constant_k_has_no_spearman_and_the_headline_says_so() -> None:
    assert "at least 0.912 in every MoE layer but 2, where k is constant." in only(
        spearman_per_layer=(0.912, None)
    )
    assert "at least 0.899 in every MoE layer." in only(spearman_per_layer=(0.8999, 0.95))
    assert "undefined, because k is constant in every MoE layer" in only()
    assert "at least -0.200 in every MoE layer." in only(spearman_per_layer=(0.9, -0.2))


def test_one_seed_is_not_called_a_mean() -> None:
    assert "seeds" not in only()
    assert only().startswith("**GeMoE keeps 98.75 % of Top-8's accuracy at 37.5 % expert sparsity;")


def test_without_an_adaptive_method_the_headline_says_so() -> None:
    text = render_report(build_results([record("top_k", 8, {"fact": 0.8})], command="x"))
    assert "Top-8 answers 80.00 % of the questions; no method that picks k" in text
    assert "layer by layer" not in text


def test_an_unknown_commit_is_named_as_such() -> None:
    made = build_results([record("top_k", 8, {"fact": 0.8}, commit=None)], command="x")
    assert "- Commit: unknown (not a git checkout)" in render_report(made)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (905, "15 min 5 s"), (7320, "2 h 2 min")],
)
def test_durations_read_well(seconds: float, expected: str) -> None:
    made = build_results([record("top_k", 8, {"fact": 0.8})], command="x", seconds=seconds)
    assert f"- Time: {expected} (of it evaluation 10 s)" in render_report(made)


def test_what_was_not_asked_is_told(results: Results) -> None:
    left_out = tuple({"row": row, "id": "s", "reason": "", "needs": None} for row in (3, 5))
    more = {"num_not_asked_by_kind": {"count": 4, "a|b": 1000}, "num_cut_answers": 1001}
    rows = tuple(row.model_copy(update=more | {"left_out": left_out}) for row in results.rows)
    said = render_report(results.model_copy(update={"rows": rows}))
    assert (
        "\n- 1,004 further questions (a|b 1,000, count 4) were not asked and count nowhere: "
        "`data.max_length` cuts 1,001 answers, and 3 questions are of 2 samples that cannot be "
        "used.\n"
    ) in said
    assert "not asked" not in render_report(results)


def test_experts_by_token_kind_are_means_over_layers_and_seeds(results: Results) -> None:
    kinds = {"image": (2.0, 4.0), "answer": (5.0, 6.0)}
    found = {"num_tokens_by_kind": {"image": 1200, "answer": 30}, "mean_k_in_answer": (4.0, 7.0)}
    rows = tuple(
        row.model_copy(update=found | {"mean_k_by_token_kind": kinds})
        if row.method == "gemoe"
        else row
        for row in results.rows
    )
    report = render_report(results.model_copy(update={"rows": rows}))
    section = report.partition("## Where the experts go")[2].partition("##")[0]
    cells = [cell.strip() for cell in section.splitlines()[4].split("|")]
    expected = [
        "GeMoE",
        "3.00 \u00b1 0.00",
        "5.50 \u00b1 0.00",
        "4.00 \u00b1 0.00",
        "7.00 \u00b1 0.00",
    ]
    assert cells[1:-1] == expected
    assert "Tokens: 1,200 image, 30 answer." in section


def test_gains_and_ablations_have_their_sections(results: Results) -> None:
    made = ablation_of(pairs_of())
    report = render_report(results.model_copy(update={"gains": gains(), "ablations": (made,)}))
    bring = report.partition("## What more experts bring")[2].partition("\n## ")[0]
    assert "By the score mass of the best 8 experts of a sample:" in bring
    assert bring.count("| k 2 to 8 ") == 2 == bring.count("| k 4 to 8 ")
    first = gains()[0].bins[0]
    assert f"{first.gain:+.1f} ({first.interval[0]:.1f} to {first.interval[1]:.1f})" in bring
    costs = report.partition("## What a dropped expert costs")[2].partition("\n## ")[0]
    (row,) = [line for line in costs.splitlines() if line.startswith("| score x norm of")]
    score_norm = next(one for one in made.predictors if one.name == "score_norm")
    assert f" {1000 * score_norm.lower_size:.2f} " in row and " 1.000 " in row
