"""95 % intervals of benchmarks, document by document: all methods meet the same resamples.

A resample draws the documents of a benchmark anew, each benchmark's by themselves. What it says of
a method depends only on how often each pattern of scores was drawn (right with k 8 and k 5, right
with k 8 alone, ...). So patterns are drawn instead of documents, which is the same and takes no
memory for 200,000 of them.

Shapes: N documents, R rows (a method with one seed), P patterns, B resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gemoe_ds.analysis.paired import RESAMPLES, Accuracies, Intervals

INTERVALS = Intervals()
_MOST_CELLS = 2**22  # of times_BP at a time


def resampled_means(scores_RN: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """The means [B, R] of every row in resamples of the documents, the same ones for all rows."""
    patterns_PR, counts_P = np.unique(scores_RN.T, axis=0, return_counts=True)
    number = scores_RN.shape[1]
    rng = np.random.default_rng(seed)
    step = max(1, _MOST_CELLS // counts_P.size)
    parts = [
        rng.multinomial(number, counts_P / number, min(step, resamples - first)) @ patterns_PR
        for first in range(0, resamples, step)
    ]
    return np.concatenate(parts) / number


def mean_of_columns(columns: Sequence[Accuracies]) -> Accuracies:
    """The average over benchmarks, every one of which counts the same."""
    found_CS = np.stack([column.found_S for column in columns])
    drawn_CBS = np.stack([column.drawn_BS for column in columns])
    return Accuracies(columns[0].seeds_S, found_CS.mean(0), drawn_CBS.mean(0))
