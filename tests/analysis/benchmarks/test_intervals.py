"""Intervals by document, against the obvious bootstrap of documents."""

from __future__ import annotations

import numpy as np
import pytest

from gemoe_ds.analysis.benchmarks.intervals import INTERVALS, mean_of_columns, resampled_means
from gemoe_ds.analysis.paired import Accuracies


def slow_means(scores_RN: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Draw documents one by one, all rows the same ones."""
    rng = np.random.default_rng(seed)
    number = scores_RN.shape[1]
    return np.array(
        [scores_RN[:, rng.integers(0, number, number)].mean(1) for _ in range(resamples)]
    )


def scores(rng: np.random.Generator, number: int, levels: int) -> np.ndarray:
    """Three methods that agree on most documents; scores from 0 to 1 in steps."""
    first_N = rng.integers(0, levels, number) / (levels - 1)
    return np.stack(
        [np.where(rng.random(number) < 0.9, first_N, rng.integers(0, levels, number) / (levels - 1))
         for _ in range(3)]
    )  # fmt: skip


@pytest.mark.parametrize("number, levels", [(300, 2), (120, 11), (40, 1000)])
def test_differences_are_spread_as_in_the_obvious_bootstrap(number: int, levels: int) -> None:
    scores_RN = scores(np.random.default_rng(number), number, levels)
    fast_BR = resampled_means(scores_RN, 8000)
    slow_BR = slow_means(scores_RN, 8000, 1)
    for name, of in (("level", lambda BR: BR[:, 0]), ("paired", lambda BR: BR[:, 1] - BR[:, 2])):
        fast_B, slow_B = of(fast_BR), of(slow_BR)
        wide = np.ptp(np.percentile(slow_B, [2.5, 97.5]))
        ends = np.percentile(fast_B, [2.5, 97.5]) - np.percentile(slow_B, [2.5, 97.5])
        assert np.abs(ends).max() < 0.06 * wide, name
        assert fast_B.std() == pytest.approx(slow_B.std(), rel=0.05), name


def test_parts_are_as_good_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    scores_RN = scores(np.random.default_rng(3), 50, 5)
    whole = resampled_means(scores_RN, 100)
    monkeypatch.setattr("gemoe_ds.analysis.benchmarks.intervals._MOST_CELLS", 300)
    assert np.array_equal(resampled_means(scores_RN, 100), whole)
    assert whole.shape == (100, 3)


def test_the_average_counts_every_benchmark_the_same() -> None:
    small, large = (
        Accuracies((0, 1), found_S, np.tile(found_S, (4, 1)))
        for found_S in (np.array([0.2, 0.4]), np.array([0.6, 0.8]))
    )
    both = mean_of_columns([small, large])
    assert both.found_S == pytest.approx([0.4, 0.6])
    assert INTERVALS.difference(both, small).value == pytest.approx(0.2)


def test_one_document_and_a_constant_have_no_width() -> None:
    assert np.array_equal(resampled_means(np.array([[1.0], [0.0]]), 5), [[1, 0]] * 5)
    same = INTERVALS.estimate(Accuracies((None,), np.ones(1), resampled_means(np.ones((1, 9)))))
    assert (same.value, same.low, same.high) == (1, 1, 1)
