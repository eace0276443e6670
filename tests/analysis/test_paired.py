"""Paired intervals: against a slow obvious version, and by how often they hold the truth."""

from __future__ import annotations

import time

import numpy as np
import pytest

from gemoe_ds.analysis.paired import Bootstrap, NoFigureError, Point, answers_at
from gemoe_ds.analysis.questions import Questions
from gemoe_ds.errors import DataError


def ragged(rng: np.random.Generator, num_pictures: int, kinds: int = 3) -> Questions:
    """Pictures with 1 to 4 questions, of some kinds more than of others; some rows have none."""
    asked = [
        (int(row), turn, f"kind {rng.integers(rng.integers(1, kinds + 1))}", False)
        for row in sorted(rng.choice(3 * num_pictures, num_pictures, replace=False))
        for turn in range(rng.integers(1, 5))
    ]
    return Questions.of(asked)


def macro(asked: Questions, right_Q: np.ndarray, rows: list[int]) -> float:
    """Accuracy over the questions of these rows, a row as often as it is named: the obvious way."""
    right: dict[int, list[float]] = {}
    for row in rows:
        for question in np.flatnonzero(asked.row_Q == row):
            right.setdefault(int(asked.kind_Q[question]), []).append(float(right_Q[question]))
    return float(np.mean([np.mean(of_kind) for of_kind in right.values()]))


def test_every_resample_equals_the_obvious_one():
    rng = np.random.default_rng(0)
    asked = ragged(rng, 12)
    bootstrap = Bootstrap(asked, resamples=40)
    right = {seed: rng.random(len(asked.row_Q)) < 0.6 for seed in (0, 1)}
    got = bootstrap.accuracies(right)
    rows = np.unique(asked.row_Q)
    for column, right_Q in enumerate(right.values()):
        assert got.found_S[column] == pytest.approx(macro(asked, right_Q, list(rows)))
        for number, times_R in enumerate(bootstrap.times_BR):
            drawn = [
                row for row, times in zip(rows, times_R, strict=True) for _ in range(int(times))
            ]
            expected = macro(asked, right_Q, drawn)
            assert got.drawn_BS[number, column] == pytest.approx(expected), "a kind may be missing"
    assert (bootstrap.times_BR.sum(1) == len(rows)).all()


def test_two_identical_models_differ_by_nothing_and_two_alike_by_nothing_significant():
    rng = np.random.default_rng(7)
    asked = ragged(rng, 400)
    bootstrap = Bootstrap(asked)
    first_Q, again_Q = rng.random((2, len(asked.row_Q))) < 0.7
    first, again = (bootstrap.accuracies({0: right_Q}) for right_Q in (first_Q, again_Q))
    same = bootstrap.difference(first, first)
    assert (same.value, same.low, same.high) == (0, 0, 0) and not same.is_significant
    alike = bootstrap.difference(first, again)
    assert alike.low < 0 < alike.high and not alike.is_significant


def test_a_planted_point_is_found_only_because_it_is_paired():
    rng = np.random.default_rng(2)
    asked = ragged(rng, 2000)
    bootstrap = Bootstrap(asked)
    better_Q = rng.random(len(asked.row_Q)) < 0.8
    worse_Q = better_Q & (rng.random(len(asked.row_Q)) > 0.01 / 0.8)  # a point of all questions
    better, worse = (bootstrap.accuracies({0: right_Q}) for right_Q in (better_Q, worse_Q))
    found = bootstrap.difference(better, worse)
    assert found.is_significant and found.low < 0.01 < found.high and found.high - found.low < 0.01
    assert bootstrap.difference(worse, better).value == -found.value
    alone = bootstrap.estimate(better)
    assert alone.high - alone.low > 0.02, "unpaired it would drown"
    kept = bootstrap.ratio(worse, better)
    assert kept.low < worse.found_S[0] / better.found_S[0] < kept.high < 1


@pytest.mark.parametrize("seeds, seed_sd", [(1, 0.0), (3, 0.0), (3, 0.03)])
def test_an_interval_holds_the_truth_in_95_of_100_cases(seeds, seed_sd):
    """Pictures are easy or hard, seeds good or bad; a difference of 1 point is the truth."""
    rng = np.random.default_rng(3)
    pictures, held, trials = 100, 0, 300
    asked = Questions.of(
        (row, turn, "ab"[turn % 2], False) for row in range(pictures) for turn in range(4)
    )
    for trial in range(trials):
        hardness_Q = np.repeat(0.25 * rng.standard_normal(pictures), 4)
        level = {0: 0.65, 1: 0.64}
        right = [
            {
                seed: rng.random(len(hardness_Q))
                < level[model] + hardness_Q.clip(-0.3, 0.3) + seed_sd * rng.standard_normal()
                for seed in range(seeds)
            }
            for model in (0, 1)
        ]
        bootstrap = Bootstrap(asked, resamples=200, seed=trial)
        a, b = (bootstrap.accuracies(answers) for answers in right)
        found = bootstrap.difference(a, b)
        held += found.low <= 0.01 <= found.high
    assert 0.92 * trials <= held <= 0.985 * trials, f"{held} of {trials}"


def test_a_curve_is_interpolated_question_by_question_and_never_extrapolated():
    rng = np.random.default_rng(4)
    asked = ragged(rng, 30)
    bits = rng.random((3, len(asked.row_Q))) < 0.5
    points = [Point(6.0, bits[2]), Point(3.0, bits[0]), Point(4.0, bits[1])]
    assert np.array_equal(answers_at(points, 3.0), bits[0])
    assert np.array_equal(answers_at(points, 6.0), bits[2])
    np.testing.assert_allclose(answers_at(points, 4.5), 0.75 * bits[1] + 0.25 * bits[2])
    bootstrap = Bootstrap(asked, resamples=20)
    at = [bootstrap.at({7: points}, k) for k in (4.0, 4.5, 6.0)]
    np.testing.assert_allclose(at[1].drawn_BS, 0.75 * at[0].drawn_BS + 0.25 * at[2].drawn_BS)
    for k in (2.99, 6.01):
        with pytest.raises(NoFigureError, match=f"both sides of mean k {k:g}: from 3.00 to 6.00"):
            bootstrap.at({0: points, 1: points[:2]}, k)
    with pytest.raises(NoFigureError, match="from 4.00 to 4.00"):
        bootstrap.at({0: points, 1: points[2:]}, 5.0)
    with pytest.raises(NoFigureError, match="none"):
        answers_at([], 5.0)


def test_seeds_are_paired_by_number_and_a_method_without_seeds_goes_with_all():
    rng = np.random.default_rng(5)
    asked = ragged(rng, 50)
    bits = {seed: rng.random(len(asked.row_Q)) < 0.5 for seed in range(4)}
    bootstrap = Bootstrap(asked, resamples=50)
    three = bootstrap.accuracies({seed: bits[seed] for seed in (0, 1, 2)})
    two = bootstrap.accuracies({seed: bits[3] for seed in (2, 1)})
    found = bootstrap.difference(three, two)
    assert found.seeds == 2 and found.value == pytest.approx(
        three.found_S[1:].mean() - two.found_S.mean()
    )
    still = bootstrap.accuracies({None: bits[3]})
    assert bootstrap.difference(still, three).seeds == bootstrap.difference(three, still).seeds == 3
    with pytest.raises(DataError, match="none in common"):
        bootstrap.difference(three, bootstrap.accuracies({5: bits[0]}))
    with pytest.raises(DataError, match=r"answers to 3 questions, not"):
        bootstrap.accuracies({0: np.ones(3)})


def test_a_contest_is_a_matter_of_seconds():
    """A tenth of one: 18,000 questions, three seeds, 2,000 resamples, two methods."""
    asked = Questions.of(
        (row, turn, f"kind {turn}", False) for row in range(2000) for turn in range(9)
    )
    began = time.process_time()
    bootstrap, rng = Bootstrap(asked), np.random.default_rng(6)
    a, b = (
        bootstrap.accuracies({seed: rng.random(18_000) < 0.8 for seed in range(3)})
        for _ in range(2)
    )
    bootstrap.difference(a, b)
    assert time.process_time() - began < 4
