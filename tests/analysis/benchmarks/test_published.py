"""The paper's own rows: some values read off the paper, and what must hold between them."""

from __future__ import annotations

import pytest

from gemoe_ds.analysis.benchmarks.published import published_blocks, remarks
from gemoe_ds.analysis.benchmarks.results import Row


def row(number: str, block: int, label: str) -> Row:
    return next(row for row in published_blocks(number)[block].rows if row.label == label)


def test_values_are_those_of_the_paper() -> None:
    gemoe = row("1", 0, "GeMoE")
    assert [cell.value for cell in gemoe.cells.values()] == [
        56.70, 88.38, 86.98, 54.88, 50.64, 44.10
    ]  # fmt: skip
    assert (gemoe.activated_parameters, gemoe.mean_k.value, gemoe.average.value) == (
        1.32e9, 5.43, 63.61
    )  # fmt: skip
    assert (
        row("1", 0, "Top-P").mean_k.value == 12.65 and row("1", 0, "MoE++").average.value == 57.55
    )
    assert row("2", 1, "Top-3").cells["MM-Vet"].value == 47.10
    assert row("2", 1, "GeMoE").cells["POPE"].value == 89.41
    assert row("8", 0, "Top-8").cells["MME sum"].value == 1105.27
    assert row("8", 0, "GeMoE").cells["RealWorldQA"].value == 60.1
    assert row("9", 0, "Top-7").cells["HumanEval"].value == 9.15
    assert row("9", 0, "GeMoE").cells["BigBench"].value == 32.32


def test_the_papers_own_percentages_follow() -> None:
    """Its text: 32.1 % and 40.8 % fewer experts."""
    assert row("2", 0, "GeMoE").sparsity.value == pytest.approx(32.1, abs=0.05)
    assert row("2", 1, "GeMoE").sparsity.value == pytest.approx(40.8, abs=0.05)
    assert row("2", 0, "GeMoE").retention.value == pytest.approx(100 * 63.61 / 63.99)
    assert row("8", 0, "GeMoE").retention is None, "it prints no average there"


def test_an_average_that_is_not_the_mean_of_its_row_is_said() -> None:
    assert [remarks(number) for number in "128"] == [[], [], []]
    (said,) = remarks("9")
    assert said == (
        "The paper prints 43.58 as the average of GeMoE on OLMoE-1B-7B (64Top8); the mean of the "
        "row is 41.84."
    )
