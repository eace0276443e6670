"""What more experts bring, by how sure the gates are of a sample: the paper's Fig. 3.

Shapes: Q questions, S samples, R resamplings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from gemoe_ds.analysis.questions import Questions
from gemoe_ds.analysis.record import spearman
from gemoe_ds.analysis.samples import Samples
from gemoe_ds.errors import DataError
from gemoe_ds.registry import ConfigModel

BINS = 8  # of equally many samples
RESAMPLINGS = 1000
MEASURES = {"entropy": "gating entropy", "mass": "score mass of the best {k} experts"}


class Bin(ConfigModel):
    """Some samples of like entropy or mass. Gains are points of accuracy over all questions."""

    value: float  # mean of the samples
    num_samples: int
    num_questions: int
    gain: float
    interval: tuple[float, float]  # 95 %, over samples


class Gain(ConfigModel):
    """From `fewer` to `more` experts, static, the backbone as it is."""

    more: int
    fewer: int
    by: str  # of MEASURES
    bins: tuple[Bin, ...]  # from the smallest value to the largest
    spearman: float | None  # of the value and the gain, over samples
    last_minus_first: tuple[float, float, float]  # gain of the last bin minus the first, interval


def gains_of(
    questions: Mapping[int, Questions],
    samples: Samples,
    backbone_k: int,
    measures: Iterable[str] = MEASURES,
) -> tuple[Gain, ...]:
    """From every smaller k to the backbone's own; `questions` by k, `samples` of the latter."""
    many = questions[backbone_k]
    return tuple(
        _gain(many, questions[fewer], samples, backbone_k, fewer, by)
        for fewer in sorted(questions)
        if fewer < backbone_k
        for by in measures
    )


def _gain(
    many: Questions, few: Questions, samples: Samples, more: int, fewer: int, by: str
) -> Gain:
    same = all(
        np.array_equal(getattr(many, name), getattr(few, name)) for name in ("row_Q", "turn_Q")
    )
    if not same or not np.isin(many.row_Q, samples.row_S).all():
        raise DataError(
            f"the evaluations with k={more} and k={fewer} did not ask the same questions, though "
            "equally many: evaluate both again on the same data"
        )
    rows_S, sample_Q = np.unique(many.row_Q, return_inverse=True)
    value_S = getattr(samples, f"{by}_S")[np.searchsorted(samples.row_S, rows_S)].astype(float)
    asked_S = np.bincount(sample_Q)
    change_Q = 100.0 * (many.right_Q.astype(float) - few.right_Q.astype(float))
    change_S = np.bincount(sample_Q, weights=change_Q)
    order = np.lexsort((rows_S, value_S))
    parts = [part for part in np.array_split(order, BINS) if part.size]
    rng = np.random.default_rng(0)
    bins, drawn = [], []
    for part in parts:
        times_RS = rng.multinomial(
            part.size, np.full(part.size, 1 / part.size), RESAMPLINGS
        ).astype(float)
        gain_R = (times_RS @ change_S[part]) / (times_RS @ asked_S[part])
        drawn.append(gain_R)
        bins.append(
            Bin(
                value=float(value_S[part].mean()),
                num_samples=part.size,
                num_questions=int(asked_S[part].sum()),
                gain=float(change_S[part].sum() / asked_S[part].sum()),
                interval=_middle(gain_R),
            )
        )
    return Gain(
        more=more,
        fewer=fewer,
        by=by,
        bins=tuple(bins),
        spearman=spearman(value_S, change_S / asked_S),
        last_minus_first=(bins[-1].gain - bins[0].gain, *_middle(drawn[-1] - drawn[0])),
    )


def _middle(values_R: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values_R, [0.025, 0.975])
    return float(low), float(high)


def gain_table(gains: tuple[Gain, ...], by: str) -> list[list[str]]:
    """A row for each pair of k; the columns are bins."""
    some = [gain for gain in gains if gain.by == by]
    values = [f"{one.value:.3g}" for one in some[0].bins]
    table = [["Experts", *values, "last minus first", "95 %", "Spearman"]]
    for gain in some:
        difference, low, high = gain.last_minus_first
        cells = [
            f"{b.gain:+z.1f} ({b.interval[0]:z.1f} to {b.interval[1]:z.1f})" for b in gain.bins
        ]
        rho = "-" if gain.spearman is None else f"{gain.spearman:z.3f}"
        ends = f"{low:z.1f} to {high:z.1f}"
        table.append([f"k {gain.fewer} to {gain.more}", *cells, f"{difference:+z.1f}", ends, rho])
    return table
