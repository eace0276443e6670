"""The report from folders of seeded numbers, compared as text; the CSV files hold its numbers."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from gemoe_ds.analysis.benchmarks.collect import read_modes
from gemoe_ds.analysis.benchmarks.report import render_report, table_csv, terminal_tables
from gemoe_ds.analysis.benchmarks.results import BenchmarkResults
from gemoe_ds.analysis.benchmarks.tables import build_results
from gemoe_ds.analysis.results import FigureFile
from tests.analysis.benchmarks.folders import demo_run

EXPECTED = Path(__file__).with_name("expected_report.md")
TASKS = {
    "pope": 30,
    "scienceqa_img": 40,
    "mme": 10,
    "ai2d": 50,
    "mmlu_anatomy": 40,
    "mmlu_virology": 20,
}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BenchmarkResults:
    monkeypatch.chdir(tmp_path)
    made = build_results(read_modes([demo_run(Path("runs/x"), TASKS)]), command="gemoe b")
    figure = FigureFile(file="mean_k_per_layer_table_1.png", caption="Mean k.")
    return made.model_copy(update={"figures": (figure,)})


def test_the_report_is_the_expected_text(results: BenchmarkResults) -> None:
    assert render_report(results) == EXPECTED.read_text(encoding="utf-8")


def test_csv_holds_the_numbers_of_the_table(results: BenchmarkResults) -> None:
    table = results.tables[0]
    lines = list(csv.DictReader(io.StringIO(table_csv(table))))
    assert [line["method"] for line in lines[:3]] == ["Top-4", "GeMoE", "Top-8"]
    assert [line["as_published"] for line in lines] == ["0"] * 2 + ["1"] * 6
    gemoe = table.blocks[0].rows[1]
    found = lines[1]
    assert float(found["SQA-I"]) == pytest.approx(gemoe.cells["SQA-I"].value)
    assert float(found["SQA-I difference low"]) == pytest.approx(
        gemoe.cells["SQA-I"].difference.interval[0]
    )
    assert found["GQA"] == "" and lines[2]["GQA"] == "50.89"
    assert "GQA low" not in found and "POPE low" not in found, "nobody fills them"
    assert found["seeds"] == "2" and lines[2]["seeds"] == ""


def test_a_narrow_terminal_sees_no_benchmarks_but_all_else(results: BenchmarkResults) -> None:
    wide = terminal_tables(results)
    assert wide == terminal_tables(results, 1000) and wide.isascii() and "*" not in wide
    narrow = terminal_tables(results, 120)
    assert "POPE" in wide and "POPE" not in narrow
    assert "Method  " in narrow and "Sparsity %" in narrow
    assert max(map(len, narrow.splitlines())) <= 120


def test_results_are_read_back(results: BenchmarkResults) -> None:
    text = results.model_dump_json(exclude_none=True)
    assert BenchmarkResults.model_validate_json(text) == results
