"""The runs of a contest, as commands: each trains one row and evaluates all its points.

One process and one thread each, so that as many run side by side as there are cores.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from experiments.compare.grid import UNTOUCHED, Grid, Row, Setting, Size, overrides
from experiments.demo import DEMO, data_steps
from experiments.in_turn import THEN
from experiments.steps import Step

RUNS, QUICK_RUNS = DEMO / "compare", DEMO / "compare_quick"
SPLITS = ("train", "validation", "test", "captions")
Training = Literal["mixed", "captions"]


@dataclass(frozen=True)
class Where:
    """What a run starts from."""

    backbone: str
    training: Training = "mixed"
    seed: int = 0
    trial: int | None = None  # its number: evaluated on validation


def chosen_for(row: str, training: Training) -> str:
    """The name under which a row's settings for a training set are kept."""
    return f"{row} {training}"


@dataclass(frozen=True)
class Job:
    """One run of one row; `records` are the folders of its evaluations."""

    row: str
    value: Any  # of the row's knob
    where: Where
    step: Step
    records: tuple[Path, ...]


class Plan:
    """Makes jobs of a grid. `taken` holds the settings that the trials chose, by `chosen_for`."""

    def __init__(self, grid: Grid, size: Size, taken: Mapping[str, Setting], runs: Path) -> None:
        self.grid, self.size, self.taken, self.runs = grid, size, taken, runs

    def contest(
        self,
        rows: list[str],
        backbones: list[str],
        seeds: list[int],
        sets: Sequence[Training] = ("mixed", "captions"),
    ) -> list[Job]:
        """Seed 0 of all rows on the first backbone comes first: a cut contest has a whole table."""
        first, *others = self.grid.backbones
        jobs: list[Job] = []
        mixed = "mixed" in sets
        for seed in seeds if mixed and first in backbones else []:
            jobs += self._all(rows, Where(first, seed=seed))
        for backbone in others:
            if mixed and backbone in backbones:
                jobs += self._all(rows, Where(backbone, seed=seeds[0]))
        if "captions" in sets and first in backbones and self.size.captions:
            jobs += self._all(rows, Where(first, "captions", seeds[0]))
        return list({job.step.name: job for job in jobs}.values())

    def trials(
        self,
        rows: list[str],
        sets: Sequence[Training] = ("mixed", "captions"),
        done: Container[str] = (),
    ) -> list[Job]:
        """Every setting of every row that trains, and the untouched model to measure them by.

        For each training set: what is best on one may not be on the other. Without those that are
        `done`, by `chosen_for`.
        """
        first = next(iter(self.grid.backbones))
        names = [name for name in self.grid.rows if self.grid.rows[name].is_static]
        jobs = [self._job(name, None, Where(first, trial=0)) for name in names]
        for training in sets:
            for name in rows:
                row = self.grid.rows[name]
                if chosen_for(name, training) in done:
                    continue
                for number in range(len(row.trials)):
                    where = Where(first, training, trial=number)
                    jobs.append(self._job(name, row.trial_value, where))
        return jobs

    def _all(self, rows: list[str], where: Where) -> Iterator[Job]:
        """Of the rows, after the runs whose gates they take."""
        for name in rows:
            row = self.grid.rows[name]
            if row.gates == UNTOUCHED and (where.training == "captions" or where.seed != 0):
                continue  # nothing is random in it, and nothing is trained
            for value in self._values(row, where):
                if not row.trains and row.gates != UNTOUCHED:
                    yield self._job(*self.grid.training_of(row.gates), where)
                yield self._job(name, value, where)

    def _values(self, row: Row, where: Where) -> list[Any]:
        if row.is_static:
            return [None]  # all in one process
        chosen = row.captions if where.training == "captions" else row.values
        if self.size is self.grid.quick:
            chosen = [value for value in chosen if value in row.quick] if row.knob else chosen
        return chosen if row.knob else [None]

    def _job(self, name: str, value: Any, where: Where) -> Job:
        row = self.grid.rows[name]
        folder, budgets = self._folder(name, value, where), self._budgets(row, where)
        command, needs = ["python", "-m", "experiments.in_turn"], [f"convert_{s}" for s in SPLITS]
        recipe = self._recipe(name, value, where)
        seconds = 8.0 + self._seconds_of_evaluation(row, budgets)
        if row.trains:
            data = self.grid.training[where.training]
            more = [f"output_dir={folder}", f"train.steps={self.size.steps}"]
            command += ["train", *recipe, *more, f"data.train_path={data}", THEN]
            source = [f"{folder}/config.yaml", "--trained", str(folder)]
            seconds += 0.42 * self.size.steps
        elif row.is_static:
            source = [*recipe, "--k", *map(str, row.values)]
        elif row.gates == UNTOUCHED:
            source = [*recipe, *_rule(row)]
        else:
            other = self._job(*self.grid.training_of(row.gates), where)
            needs.append(other.step.name)
            run = other.step.output
            source = [f"{run}/config.yaml", "--trained", str(run), *_rule(row)]
        split = self.size.split if where.trial is None else "validation"
        out = folder / split
        options = ["--data", f"{DEMO}/data/{split}", "--out", str(out), "--name", name]
        if self.size.samples and where.trial is None:
            options += ["--limit", str(self.size.samples)]
        if budgets:
            if split == "validation":  # no dial is set on what it is scored on
                options += ["--calibrate", self.grid.training["mixed"]]
            options += ["--calibration-samples", str(self.size.calibration_samples)]
            options += ["--mean-k", *(f"{k:g}" for k in budgets)]
        command += ["evaluate", *source, *options]
        label = "_".join(folder.relative_to(self.runs).parts)
        recipe_file = Path(self.grid.recipe)
        step = Step(label, tuple(command), folder, round(seconds), tuple(needs), recipe_file)
        return Job(name, value, where, step, tuple(self._records(row, out, budgets)))

    def _folder(self, name: str, value: Any, where: Where) -> Path:
        label = name if value is None else f"{name}_{value}"
        if where.trial is not None:
            return self.runs / "trials" / where.training / f"{label}_{where.trial}"
        return self.runs / where.backbone / where.training / f"{label}_seed_{where.seed}"

    def _recipe(self, name: str, value: Any, where: Where) -> list[str]:
        row = self.grid.rows[name]
        setting = self.taken.get(
            chosen_for(name, where.training), row.trials[0] if row.trials else {}
        )
        if where.trial is not None and row.trials:
            setting = row.trials[where.trial]
        router, *options = overrides(self.grid, row, value, setting)
        return [
            self.grid.recipe,
            *([router] if row.trains else []),  # of others --k or --router says it
            *options,
            f"model.checkpoint={self.grid.backbones[where.backbone]}",
            f"seed={where.seed}",
        ]

    def _budgets(self, row: Row, where: Where) -> list[float]:
        if row.knob:
            return []
        if where.trial is not None:
            return [self.grid.trial_budget]
        return self.size.budgets

    def _records(self, row: Row, out: Path, budgets: list[float]) -> Iterator[Path]:
        if row.is_static:
            yield from (out / f"k_{k}" for k in row.values)
        elif budgets:
            rule = "" if row.trains else f"{row.router['name']}_"
            yield from (out / f"{rule}mean_k_{k:g}" for k in budgets)
        else:
            yield out

    def _seconds_of_evaluation(self, row: Row, budgets: list[float]) -> float:
        points = len(budgets) or (len(row.values) if row.is_static else 1)
        calibration = 5 * self.size.calibration_samples if budgets else 0
        return 0.006 * points * ((self.size.samples or 2000) + calibration)


def _rule(row: Row) -> list[str]:
    """A router without weights, on gates that are there."""
    return ["--router", yaml.safe_dump(row.router, default_flow_style=True).strip()]


def preparation() -> list[Step]:
    """The data."""
    return data_steps(SPLITS)
