"""What a contest has measured: every evaluation, with right or wrong of every question.

`contest.json` and `answers.npz`: all figures of the report follow from these two, and another
machine goes on from them.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.compare.grid import UNTOUCHED, Grid, Setting
from experiments.compare.jobs import Job
from experiments.steps import Progress
from gemoe_ds.analysis.paired import NO_SEED, Curve, Point
from gemoe_ds.analysis.questions import Questions
from gemoe_ds.analysis.record import load_json, read_questions, read_record
from gemoe_ds.errors import DataError
from gemoe_ds.files import write_text
from gemoe_ds.registry import ConfigModel

CONTEST, ANSWERS = "contest.json", "answers.npz"


class Trial(ConfigModel):
    """One setting of one row, on the validation split."""

    setting: Setting
    mean_k: float
    accuracy: float
    above_static: float  # the untouched model at this mean k, interpolated


class Tried(ConfigModel):
    """The trials of one row. `taken` has the largest `above_static`."""

    trials: tuple[Trial, ...]
    taken: int


class Measured(ConfigModel):
    """One evaluation of one run."""

    row: str
    value: Any  # of the row's knob
    budget: float | None  # of its dial
    backbone: str
    training: str
    seed: int | None  # None: nothing in it is random
    mean_k: float
    accuracy: float
    seconds: float
    train_seconds: float | None
    machine: str
    commit: str | None
    date: str
    fingerprint: str  # of the run's command and of whatever it was made from


class Contest(ConfigModel):
    """All evaluations, in the order of the rows of `answers.npz`, and the rules they follow."""

    command: str
    grid: Grid
    is_quick: bool
    tried: dict[str, Tried]  # by row and training set
    measured: tuple[Measured, ...]
    missing: tuple[str, ...]  # runs of this contest that are not done, or failed


@dataclass(frozen=True, eq=False)
class Answers:
    """The questions, and of every evaluation what was right."""

    contest: Contest
    asked: Questions
    right_PQ: np.ndarray

    def of_run(self, fingerprint: str) -> list[tuple[Measured, np.ndarray]]:
        """Every evaluation of one run; none if it is not among them."""
        pairs = zip(self.contest.measured, self.right_PQ, strict=True)
        return [pair for pair in pairs if pair[0].fingerprint == fingerprint]

    def curves(self, backbone: str, training: str) -> dict[str, Curve]:
        """By row. A model that nobody trained is the same whatever the others train on."""
        found: dict[str, dict[int | None, list[Point]]] = {}
        for name, row in self.contest.grid.rows.items():
            data = "mixed" if row.gates == UNTOUCHED else training
            for measured, right_Q in zip(self.contest.measured, self.right_PQ, strict=True):
                if (measured.row, measured.backbone, measured.training) == (name, backbone, data):
                    points = found.setdefault(name, {}).setdefault(measured.seed, [])
                    points.append(Point(measured.mean_k, right_Q))
        return dict(found)

    def control(self, backbone: str, training: str) -> dict[int | None, np.ndarray]:
        """By seed, what retention is measured against."""
        name, value = self.contest.grid.training_of(self.contest.grid.control)
        return {
            m.seed: right_Q
            for m, right_Q in zip(self.contest.measured, self.right_PQ, strict=True)
            if (m.row, m.value, m.backbone, m.training) == (name, value, backbone, training)
        }


def collect(
    grid: Grid,
    jobs: Sequence[Job],
    tried: dict[str, Tried],
    progress: Progress,
    kept: Answers | None = None,
    *,
    is_quick: bool,
    command: str,
) -> Answers:
    """From `kept`, or the folders of finished runs; DataError if other questions were asked."""
    asked = kept.asked if kept else None
    measured, right, missing = [], [], []
    for job in jobs:
        fingerprint = progress.fingerprints[job.step.name]
        found = kept.of_run(fingerprint) if kept else []
        if not found and progress.is_done(job.step):
            read = [_of_folder(folder, grid, job, fingerprint) for folder in job.records]
            for folder, (_, questions) in zip(job.records, read, strict=True):
                asked = asked or questions
                if not _same(asked, questions):
                    raise DataError(f"{folder} has answers to other questions than the others")
            found = [(one, questions.right_Q) for one, questions in read]
        if not found:
            missing.append(job.step.name)
        measured += [one for one, _ in found]
        right += [right_Q for _, right_Q in found]
    if asked is None or not right:
        raise DataError("no run of this contest is done yet: run it without --report")
    contest = Contest(
        command=command,
        grid=grid,
        is_quick=is_quick,
        tried=tried,
        measured=tuple(measured),
        missing=tuple(missing),
    )
    return Answers(contest, asked, np.stack(right))


def _of_folder(folder: Path, grid: Grid, job: Job, fingerprint: str) -> tuple[Measured, Questions]:
    record, _ = read_record(folder)
    untouched = grid.rows[job.row].gates == UNTOUCHED
    measured = Measured(
        row=job.row,
        value=record.k if grid.rows[job.row].is_static else job.value,
        budget=record.budget_k,
        backbone=job.where.backbone,
        training=job.where.training,
        seed=NO_SEED if untouched else job.where.seed,
        mean_k=record.mean_k,
        accuracy=record.accuracy,
        seconds=record.seconds,
        train_seconds=record.train_seconds,
        machine=record.machine,
        commit=record.commit,
        date=record.date,
        fingerprint=fingerprint,
    )
    return measured, read_questions(folder, record)


def left_to_run(jobs: Sequence[Job], progress: Progress, kept: Answers | None) -> list[Job]:
    """Without those whose answers are kept, unless one that is left needs what they made."""
    if kept is None:
        return list(jobs)
    left = {j.step.name for j in jobs if not kept.of_run(progress.fingerprints[j.step.name])}
    for job in reversed(jobs):  # a run comes after those that it needs
        if job.step.name in left and not progress.is_done(job.step):
            left |= set(job.step.needs)
    return [job for job in jobs if job.step.name in left]


def _same(a: Questions, b: Questions) -> bool:
    return all(
        np.array_equal(x, y) for n, x in vars(a).items() if n != "right_Q" for y in [vars(b)[n]]
    )


def write_answers(folder: Path, answers: Answers) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {n: a for n, a in vars(answers.asked).items() if n != "right_Q"}
    packed = np.packbits(answers.right_PQ, axis=1)
    np.savez_compressed(folder / ANSWERS, right_PB=packed, **arrays)
    write_text(folder / CONTEST, answers.contest.model_dump_json(indent=1) + "\n")


def read_answers(folder: Path) -> Answers:
    """What `write_answers` wrote; DataError, one line, if it is missing or damaged."""
    again = "run python -m experiments.compare"
    contest = load_json(folder / CONTEST, Contest, again)
    path = folder / ANSWERS
    try:
        with np.load(path, allow_pickle=False) as arrays:
            rest = {name: arrays[name] for name in arrays if name != "right_PB"}
            right = np.unpackbits(arrays["right_PB"], axis=1, count=rest["row_Q"].size) > 0
        if len(right) != len(contest.measured):
            raise ValueError(f"{len(right)} evaluations, {len(contest.measured)} in {CONTEST}")
        return Answers(contest, Questions(right_Q=right[0], **rest), right)
    except (OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is missing or damaged ({error}): {again}") from None
