"""Accuracy of every row at the same mean k, and differences, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from experiments.compare.answers import Answers
from gemoe_ds.analysis.paired import Accuracies, Bootstrap, Curve, Estimate, NoFigureError

AT = (3.0, 4.0, 5.0, 6.0)  # mean k
SPARSITIES = (0.5, 0.55, 0.625, 0.7)  # share of the backbone's k that is saved


@dataclass(frozen=True)
class Standing:
    """One row at one mean k; where a difference is to the row itself there is none."""

    accuracy: Estimate
    to_ours: Estimate | None
    to_reference: Estimate | None


@dataclass(frozen=True)
class Standings:
    """One backbone and training set. A row without a figure at a mean k is in `reasons`."""

    backbone: str
    training: str
    at: dict[tuple[str, float], Standing]
    reasons: dict[tuple[str, float], str]
    retention: dict[tuple[str, float], Estimate]  # by row and sparsity: share of the control's

    def rows(self) -> list[str]:
        return list(dict.fromkeys(row for row, _ in [*self.at, *self.reasons]))

    def get(self, row: str, k: float) -> Standing | None:
        return self.at.get((row, k))


def standings(
    answers: Answers,
    bootstrap: Bootstrap,
    backbone: str,
    training: str = "mixed",
    at: tuple[float, ...] = AT,
) -> Standings:
    """All rows that were measured on this backbone with this training set."""
    grid = answers.contest.grid
    curves = answers.curves(backbone, training)
    found, reasons = {}, {}
    for row, curve in curves.items():
        for k in at:
            try:
                found[row, k] = bootstrap.at(curve, k)
            except NoFigureError as error:
                reasons[row, k] = str(error)

    def to(other: str, row: str, k: float) -> Estimate | None:
        if row == other or (other, k) not in found:
            return None
        return bootstrap.difference(found[row, k], found[other, k])

    standing = {
        (row, k): Standing(
            bootstrap.estimate(accuracies), to(grid.ours, row, k), to(grid.reference, row, k)
        )
        for (row, k), accuracies in found.items()
    }
    retention = _retention(answers, bootstrap, backbone, training, curves)
    return Standings(backbone, training, standing, reasons, retention)


def _retention(
    answers: Answers,
    bootstrap: Bootstrap,
    backbone: str,
    training: str,
    curves: Mapping[str, Curve],
) -> dict[tuple[str, float], Estimate]:
    right = answers.control(backbone, training)
    if not right:
        return {}
    control: Accuracies = bootstrap.accuracies(right)
    full_k = max(
        m.mean_k
        for m in answers.contest.measured
        if (m.row, m.value) == answers.contest.grid.training_of(answers.contest.grid.control)
    )
    found = {}
    for row, curve in curves.items():
        for sparsity in SPARSITIES:
            try:
                here = bootstrap.at(curve, full_k * (1 - sparsity))
            except NoFigureError:
                continue
            found[row, sparsity] = bootstrap.ratio(here, control)
    return found
