"""Gains of more experts by entropy and mass, against counts by hand and planted trends."""

from __future__ import annotations

import numpy as np
import pytest

from gemoe_ds.analysis.gains import BINS, gain_table, gains_of
from gemoe_ds.analysis.questions import Questions
from gemoe_ds.analysis.record import spearman
from gemoe_ds.analysis.samples import Samples
from gemoe_ds.errors import DataError


def asked(right_Q: np.ndarray, rows_Q: np.ndarray) -> Questions:
    turns = (np.arange(rows_Q.size) - np.searchsorted(rows_Q, rows_Q)).tolist()
    kinds = ["x" if turn % 2 else "y" for turn in turns]
    return Questions.of(
        (int(r), t, k, bool(ok)) for r, t, k, ok in zip(rows_Q, turns, kinds, right_Q, strict=True)
    )


def planted(seed: int, slope: float, number: int = 400):
    """What k 8 has right and k 2 has not is likelier in samples of high entropy, by `slope`."""
    rng = np.random.default_rng(seed)
    entropy_S = rng.random(number)
    rows_Q = np.sort(rng.integers(0, number, 4 * number))
    loses_Q = rng.random(rows_Q.size) < 0.2 + slope * (entropy_S[rows_Q] - 0.5)
    few_Q = rng.random(rows_Q.size) < 0.9
    samples = Samples.of({int(r): (entropy_S[r], 1 - entropy_S[r]) for r in range(number)})
    questions = {8: asked(few_Q | loses_Q, rows_Q), 2: asked(few_Q & ~loses_Q, rows_Q)}
    return questions, samples


def test_bins_hold_the_counts_of_their_samples() -> None:
    questions, samples = planted(0, 0.3)
    gains = gains_of(questions | {4: questions[8]}, samples, 8)
    assert [(g.fewer, g.by) for g in gains] == [
        (2, "entropy"),
        (2, "mass"),
        (4, "entropy"),
        (4, "mass"),
    ]
    gain = gains[0]
    rows = sorted(set(questions[8].row_Q.tolist()), key=lambda row: samples.entropy_S[row])
    parts = np.array_split(np.array(rows), BINS)
    change_Q = questions[8].right_Q.astype(int) - questions[2].right_Q.astype(int)
    for part, found in zip(parts, gain.bins, strict=True):
        of_Q = np.isin(questions[8].row_Q, part)
        assert (found.num_samples, found.num_questions) == (len(part), of_Q.sum())
        assert found.value == pytest.approx(samples.entropy_S[part].mean())
        assert found.gain == pytest.approx(100 * change_Q[of_Q].mean())
        assert found.interval[0] <= found.gain <= found.interval[1]
    by_row = [change_Q[questions[8].row_Q == row].mean() for row in rows]
    assert gain.spearman == pytest.approx(spearman(samples.entropy_S[rows], np.array(by_row)))
    assert all(b.gain == 0 == b.interval[1] for b in gains[2].bins) and gains[2].spearman is None
    assert gain_table(gains, "mass")[1][0] == "k 2 to 8"


def test_a_planted_trend_is_found_and_none_is_not() -> None:
    with_trend = [gains_of(*planted(seed, 0.3), 8) for seed in range(6)]
    assert all(entropy.last_minus_first[1] > 0 for entropy, _ in with_trend)
    assert all(mass.last_minus_first[2] < 0 for _, mass in with_trend)
    without = [gains_of(*planted(seed, 0.0), 8)[0].last_minus_first for seed in range(12)]
    assert sum(low < 0 < high for _, low, high in without) >= 10


def test_other_questions_are_refused() -> None:
    questions, samples = planted(0, 0.3)
    other = Questions(**(vars(questions[2]) | {"turn_Q": questions[2].turn_Q + np.int16(1)}))
    with pytest.raises(DataError, match="k=8 and k=2 did not ask the same"):
        gains_of({8: questions[8], 2: other}, samples, 8)
    few = Samples(*(array[5:] for array in vars(samples).values()))
    with pytest.raises(DataError, match="did not ask the same"):
        gains_of(questions, few, 8)


def test_three_samples_fill_three_bins() -> None:
    questions = {8: asked(np.array([1, 1, 1]), np.arange(3)), 4: asked(np.zeros(3), np.arange(3))}
    samples = Samples.of({2: (3.0, 0.1), 0: (1.0, 0.5), 1: (2.0, 0.2)})
    gain, _ = gains_of(questions, samples, 8)
    assert [b.value for b in gain.bins] == [1, 2, 3] and {b.gain for b in gain.bins} == {100}
