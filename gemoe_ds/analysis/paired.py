"""Two methods on the same questions: accuracy at a mean k, differences, and 95 % intervals of them.

The questions of one picture are not independent of each other: a resample draws pictures, with all
questions of each, and all methods get the same draws. Accuracy is the mean over kinds. A method is
a curve of points (mean k, right or wrong of every question) for each of its seeds. Between two
points of one seed the answers themselves are interpolated, so that differences stay paired.

Shapes: Q questions, C kinds, R pictures (rows of the data), B resamples, S seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gemoe_ds.analysis.questions import Questions
from gemoe_ds.errors import DataError

RESAMPLES = 2000
ENDS = (2.5, 97.5)  # percent: a 95 % interval
NO_SEED: int | None = None  # the key of a method in which nothing is random


class NoFigureError(DataError):
    """A curve has no point on both sides of a mean k; nothing is extrapolated."""


@dataclass(frozen=True, eq=False)
class Point:
    """One evaluation."""

    mean_k: float
    right_Q: np.ndarray


Curve = Mapping[int | None, Sequence[Point]]  # by seed


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval; `seeds` were averaged, and count in it where there are several."""

    value: float
    low: float
    high: float
    seeds: int

    @property
    def is_significant(self) -> bool:
        """The interval of a difference leaves out 0."""
        return self.low > 0 or self.high < 0


def answers_at(points: Sequence[Point], mean_k: float) -> np.ndarray:
    """The share right of every question at a mean k, on the line between the two nearest points."""
    below = max((p for p in points if p.mean_k <= mean_k), key=lambda p: p.mean_k, default=None)
    above = min((p for p in points if p.mean_k >= mean_k), key=lambda p: p.mean_k, default=None)
    if below is None or above is None:
        found = sorted(p.mean_k for p in points)
        reach = f"from {found[0]:.2f} to {found[-1]:.2f}" if found else "none"
        raise NoFigureError(f"no points on both sides of mean k {mean_k:g}: {reach}")
    width = above.mean_k - below.mean_k
    share = (mean_k - below.mean_k) / width if width else 0.0
    return (1 - share) * below.right_Q + share * above.right_Q


@dataclass(frozen=True, eq=False)
class Accuracies:
    """Of one method at one mean k: as found, and in every resample of the pictures."""

    seeds_S: tuple[int | None, ...]
    found_S: np.ndarray
    drawn_BS: np.ndarray


class Intervals:
    """What resamples say of one method, and of two that have the same resamples."""

    def estimate(self, of: Accuracies) -> Estimate:
        return self._estimate(of.found_S, of.drawn_BS)

    def difference(self, a: Accuracies, b: Accuracies) -> Estimate:
        """a - b, seed by seed: over the seeds of both, or all if one of them has no seed."""
        pairs = _pairs(a.seeds_S, b.seeds_S)
        left, right = [i for i, _ in pairs], [j for _, j in pairs]
        return self._estimate(
            a.found_S[left] - b.found_S[right], a.drawn_BS[:, left] - b.drawn_BS[:, right]
        )

    def ratio(self, a: Accuracies, b: Accuracies) -> Estimate:
        """a / b, over seeds as in `difference`."""
        pairs = _pairs(a.seeds_S, b.seeds_S)
        left, right = [i for i, _ in pairs], [j for _, j in pairs]
        return self._estimate(
            a.found_S[left] / b.found_S[right], a.drawn_BS[:, left] / b.drawn_BS[:, right]
        )

    def _estimate(self, found_S: np.ndarray, drawn_BS: np.ndarray) -> Estimate:
        """Percentiles of the resampled mean over seeds, moved by what other seeds would do to it.

        Two or three seeds are too few to be resampled themselves: the interval that three give
        holds the truth in 75 % of the cases. So the mean is moved by its standard error times
        Student's t, S - 1 degrees of freedom. Seeds differ, too, because questions are a sample,
        and the resamples hold that already; half of it is left out of the error. (All of it: the
        intervals are too short where seeds matter, 91 % in simulations; none of it: too long where
        they do not, 99.6 %; half: 94 to 98 %.)
        """
        drawn_B, num_seeds = drawn_BS.mean(1), found_S.size
        if num_seeds > 1:
            apart_BS = drawn_BS - drawn_B[:, None]
            of_questions = apart_BS.var(0).sum() / (num_seeds - 1)
            error = np.sqrt(max(0.0, found_S.var(ddof=1) - of_questions / 2) / num_seeds)
            rng = np.random.default_rng(num_seeds)  # the same for all pairs
            drawn_B = drawn_B + error * rng.standard_t(num_seeds - 1, drawn_B.size)
        low, high = np.percentile(drawn_B, ENDS)
        return Estimate(float(found_S.mean()), float(low), float(high), num_seeds)


class Bootstrap(Intervals):
    """The resamples of one set of questions: the same ones for all methods."""

    def __init__(self, asked: Questions, resamples: int = RESAMPLES, seed: int = 0) -> None:
        self.asked = asked
        rows, self.picture_Q = np.unique(asked.row_Q, return_inverse=True)
        self.num_pictures, self.num_kinds = len(rows), len(asked.kinds_C)
        self.rng = np.random.default_rng(seed)
        even = np.full(self.num_pictures, 1 / self.num_pictures)
        self.times_BR = self.rng.multinomial(self.num_pictures, even, resamples).astype(float)
        self.asked_BC = self.times_BR @ self._sums(np.ones(len(asked.row_Q)))
        self.asked_C = np.bincount(asked.kind_Q, minlength=self.num_kinds)

    def at(self, curve: Curve, mean_k: float) -> Accuracies:
        """Interpolated at a mean k; NoFigureError if any seed does not reach it."""
        return self.accuracies({seed: answers_at(points, mean_k) for seed, points in curve.items()})

    def accuracies(self, right: Mapping[int | None, np.ndarray]) -> Accuracies:
        """By seed: right or wrong, or a share, of every question."""
        found, drawn = [], []
        for right_Q in right.values():
            if right_Q.shape != self.asked.row_Q.shape:
                raise DataError(
                    f"answers to {right_Q.size:,} questions, not to {self.asked.row_Q.size:,}"
                )
            sums_RC = self._sums(right_Q)
            found.append((sums_RC.sum(0) / self.asked_C).mean())
            # A kind that a resample has not drawn at all is left out of its mean.
            with np.errstate(invalid="ignore"):
                drawn.append(np.nanmean((self.times_BR @ sums_RC) / self.asked_BC, axis=1))
        return Accuracies(tuple(right), np.array(found), np.stack(drawn, axis=1))

    def _sums(self, right_Q: np.ndarray) -> np.ndarray:
        """By picture and kind."""
        place_Q = self.picture_Q * self.num_kinds + self.asked.kind_Q
        size = self.num_pictures * self.num_kinds
        return np.bincount(place_Q, right_Q, size).reshape(self.num_pictures, self.num_kinds)


def _pairs(a: Sequence[int | None], b: Sequence[int | None]) -> list[tuple[int, int]]:
    """Places in a and b that belong together; DataError if there are none."""
    if b == (NO_SEED,):
        pairs = [(i, 0) for i in range(len(a))]
    elif a == (NO_SEED,):
        pairs = [(0, j) for j in range(len(b))]
    else:
        pairs = [(i, b.index(seed)) for i, seed in enumerate(a) if seed in b]
    if not pairs:
        raise DataError(f"seeds {list(a)} and {list(b)} have none in common: train the same ones")
    return pairs
