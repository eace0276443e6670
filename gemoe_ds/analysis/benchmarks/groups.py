"""The rows of a block: runs that differ in their seed alone, and what is measured of them.

Shapes: L MoE layers, R runs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from gemoe_ds.analysis import results as evaluations
from gemoe_ds.analysis.benchmarks.collect import ModeRun, check_comparable
from gemoe_ds.analysis.benchmarks.columns import COLUMNS, Column
from gemoe_ds.analysis.benchmarks.intervals import INTERVALS, mean_of_columns, resampled_means
from gemoe_ds.analysis.benchmarks.results import Cell, Difference
from gemoe_ds.analysis.comparable import check_seeds
from gemoe_ds.analysis.paired import Accuracies
from gemoe_ds.errors import DataError


@dataclass(frozen=True, eq=False)
class Group:
    """One method, k and budget: its seeds."""

    runs: tuple[ModeRun, ...]

    @property
    def first(self) -> ModeRun:
        return self.runs[0]

    @property
    def is_adaptive(self) -> bool:
        return self.first.mode.k is None

    @property
    def label(self) -> str:
        mode = self.first.mode
        return evaluations.Group(mode.method, mode.k, mode.budget_k, ()).label

    @property
    def seeds(self) -> tuple[int | None, ...]:
        return tuple(run.key[-1] for run in self.runs)

    def cell(self, of: Callable[[ModeRun], float]) -> Cell:
        values = [of(run) for run in self.runs]
        sd = statistics.stdev(values) if len(values) > 1 else None
        return Cell(value=statistics.fmean(values), sd=sd)


@dataclass(frozen=True, eq=False)
class Model:
    """The groups of one base model: fixed k first, largest first; then what picks k."""

    backbone: str
    base: str | None
    groups: tuple[Group, ...]

    @property
    def runs(self) -> list[ModeRun]:
        return [run for group in self.groups for run in group.runs]

    @property
    def title(self) -> str:
        mode = self.groups[0].first.mode
        name = self.base.rstrip("/").rsplit("/", 1)[-1] if self.base else "random weights"
        return f"{self.backbone}, {name} ({mode.num_experts}Top{mode.backbone_k})"

    @property
    def baseline(self) -> Group | None:
        """The untouched model at its own k."""
        for group in self.groups:
            mode = group.first.mode
            if mode.method == evaluations.BASELINE and mode.k == mode.backbone_k:
                return group
        return None

    def ran(self, columns: Iterable[Column]) -> list[Column]:
        """Those that any run has."""
        return [c for c in columns if any(c.heading in run.columns for run in self.runs)]

    def is_whole(self, group: Group, column: Column) -> bool:
        """All seeds answered all parts that any run of the model has."""
        parts = {task for run in self.runs for task in run.tasks if column.has(task)}
        return all(parts <= run.tasks.keys() for run in group.runs)


def models_of(runs: Sequence[ModeRun]) -> list[Model]:
    """In the order of their first run; DataError where runs of a model cannot be compared."""
    found: dict[tuple[str, str | None], dict[tuple, list[ModeRun]]] = {}
    for run in runs:
        backbone, base, *method, _ = run.key
        found.setdefault((backbone, base), {}).setdefault(tuple(method), []).append(run)
    return [_model(*key, members) for key, members in found.items()]


def _model(backbone: str, base: str | None, members: dict[tuple, list[ModeRun]]) -> Model:
    def place(key: tuple) -> tuple:
        method, k, budget = key
        return k is None, method != evaluations.BASELINE, method, -(k or 0), -(budget or math.inf)

    groups = [
        Group(tuple(sorted(members[key], key=lambda run: run.mode.seed)))
        for key in sorted(members, key=place)
    ]
    model = Model(backbone, base, tuple(groups))
    check_comparable(model.runs)
    first = model.runs[0]
    for run in model.runs:
        for name in ("backbone_k", "num_experts", "parameters_per_expert", "base_digest"):
            here, there = getattr(run.mode, name), getattr(first.mode, name)
            if here != there and here and there:
                raise DataError(
                    f"{run.folder} has {name} = {here}, {first.folder} has {there}, and both say "
                    f"that they are of {base or backbone}: answer both from the same checkpoint"
                )
    for group in groups:
        check_seeds(group.label, [(str(run.folder), run.mode) for run in group.runs])
    return model


class Measures:
    """Of a model: scores and intervals, column by column, and averages of them."""

    def __init__(self, model: Model, columns: Sequence[Column]) -> None:
        self.model = model
        self.columns = model.ran(columns)
        self.averaged = [column for column in self.columns if not column.parts]
        self.drawn = {column.heading: self._drawn(column) for column in self.averaged}
        # The means of documents in every row that is whole.
        self.by_document = [column for column in self.averaged if self.drawn[column.heading]]

    def _drawn(self, column: Column) -> dict[Group, Accuracies]:
        """By group; none at all where the score of any is not a mean over documents."""
        groups = [group for group in self.model.groups if self.model.is_whole(group, column)]
        scores = [run.right(column) for group in groups for run in group.runs]
        if not scores or any(right_N is None for right_N in scores):
            return {}
        scores_RN = np.stack([right_N for right_N in scores if right_N is not None])
        seed = COLUMNS.index(column)  # not the same luck in every benchmark
        drawn_BR, found_R = resampled_means(scores_RN, seed=seed), scores_RN.mean(1)
        by_group, first = {}, 0
        for group in groups:
            some = slice(first, first + len(group.runs))
            by_group[group] = Accuracies(group.seeds, found_R[some], drawn_BR[:, some])
            first = some.stop
        return by_group

    def cells(self, group: Group) -> dict[str, Cell]:
        found: dict[str, Cell] = {}
        for column in self.columns:
            if not self.model.is_whole(group, column):
                continue
            for place, heading in enumerate(column.headings):
                cell = group.cell(lambda run, c=column, p=place: float(run.values(c)[p]))  # type: ignore[misc]
                found[heading] = cell
            drawn = self.drawn.get(column.heading, {})
            if group in drawn:
                found[column.heading] = self._with_intervals(found[column.heading], group, drawn)
        return found

    def average(self, group: Group) -> Cell | None:
        """Over all columns that ran; None where this group lacks one."""
        cell = self._mean(group, self.averaged)
        if cell is None or len(self.by_document) < len(self.averaged):
            return cell
        return self._with_intervals(cell, group, self._averages(self.averaged))

    def average_by_document(self, group: Group) -> Cell | None:
        cell = self._mean(group, self.by_document)
        if cell is None:
            return None
        return self._with_intervals(cell, group, self._averages(self.by_document))

    def retention(self, group: Group) -> Cell | None:
        base = self.model.baseline
        of_base = base and self._mean(base, self.averaged)
        if not base or not of_base or not of_base.value or not self._mean(group, self.averaged):
            return None

        cell = group.cell(lambda run: 100 * self._mean_of(run, self.averaged) / of_base.value)
        if len(self.by_document) < len(self.averaged):
            return cell
        drawn = self._averages(self.averaged)
        if not drawn[base].drawn_BS.all():  # so few documents that a resample has none right
            return cell
        found = INTERVALS.ratio(drawn[group], drawn[base])
        return cell.model_copy(update={"interval": (100 * found.low, 100 * found.high)})

    def mean_k_L(self, run: ModeRun) -> np.ndarray:
        """Over the columns, every one of which counts the same."""
        return np.mean([run.routing[column.heading].mean_k_L for column in self.columns], axis=0)

    def _mean(self, group: Group, columns: Sequence[Column]) -> Cell | None:
        if not columns or not all(self.model.is_whole(group, column) for column in columns):
            return None
        return group.cell(lambda run: self._mean_of(run, columns))

    def _mean_of(self, run: ModeRun, columns: Sequence[Column]) -> float:
        return statistics.fmean(float(run.values(column)[-1]) for column in columns)

    def _averages(self, columns: Sequence[Column]) -> dict[Group, Accuracies]:
        drawn = [self.drawn[column.heading] for column in columns]
        whole = [group for group in self.model.groups if all(group in one for one in drawn)]
        return {group: mean_of_columns([one[group] for one in drawn]) for group in whole}

    def _with_intervals(self, cell: Cell, group: Group, drawn: dict[Group, Accuracies]) -> Cell:
        own, base = INTERVALS.estimate(drawn[group]), self.model.baseline
        found: dict[str, object] = {"interval": (own.low, own.high)}
        if base and base is not group and base in drawn:
            apart = INTERVALS.difference(drawn[group], drawn[base])
            found["difference"] = Difference(value=apart.value, interval=(apart.low, apart.high))
        return cell.model_copy(update=found)
