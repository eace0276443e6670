"""Folders of runs -> what each way to route answered, benchmark by benchmark.

A run holds benchmarks/MODE/TASK; a folder of modes, and a mode itself, may be given too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from gemoe_ds.analysis.benchmarks.columns import COLUMNS, Column
from gemoe_ds.analysis.benchmarks.files import (
    MODE,
    SCORES,
    Mode,
    ScoredDocuments,
    Scores,
    ShownAnswer,
    read_mode,
    read_scored,
    read_scores,
    read_shown,
)
from gemoe_ds.analysis.benchmarks.routing import Routing, read_routing
from gemoe_ds.errors import DataError

BENCHMARKS = "benchmarks"  # of a run
_ROUNDED = 1e-3  # points: lmms_eval rounds MMMU's share to five digits
ANSWERS = "answers.jsonl"
Key = tuple[str, str | None, str, int | None, float | None, int | None]


@dataclass(frozen=True, eq=False)
class Answered:
    """One leaf task, answered in one way and scored."""

    folder: Path
    scores: Scores
    documents: ScoredDocuments
    shown: tuple[ShownAnswer, ...]


@dataclass(eq=False)
class ModeRun:
    """One way to route: what it answered, by leaf task; also what is not scored yet."""

    mode: Mode
    folder: Path
    tasks: dict[str, Answered]
    unscored: list[str] = field(default_factory=list)

    @property
    def key(self) -> Key:
        """No two of a table share it. What was not trained is the same whatever the seed."""
        mode = self.mode
        seed = None if mode.checkpoint is None else mode.seed
        return mode.backbone, mode.base, mode.method, mode.k, mode.budget_k, seed

    @cached_property
    def columns(self) -> dict[str, list[Answered]]:
        """By the paper's column: its parts, in the order of their names."""
        parts = {
            column.heading: [self.tasks[task] for task in sorted(self.tasks) if column.has(task)]
            for column in COLUMNS
        }
        return {heading: answered for heading, answered in parts.items() if answered}

    @cached_property
    def routing(self) -> dict[str, Routing]:
        """By the paper's column."""
        return {
            heading: read_routing([part.folder for part in parts], self.mode)
            for heading, parts in self.columns.items()
        }

    def values(self, column: Column) -> np.ndarray:
        """As the paper prints them: parts count by their documents, as the harnesses weigh them."""
        parts = self.columns[column.heading]
        table = [column.values(part.scores) for part in parts]
        weights = [part.scores.num_documents for part in parts]
        return np.average(table, axis=0, weights=weights)

    def right(self, column: Column) -> np.ndarray | None:
        """The score of every document, part by part; None where the column is not their mean."""
        if not column.is_mean:
            return None
        parts = self.columns[column.heading]
        right_N = np.concatenate([part.documents.right_N for part in parts])
        score = self.values(column)[-1]
        for scale in {column.scale, 100.0}:  # some harness's percent are means of 0 and 1
            if abs(scale * right_N.mean() - score) < _ROUNDED:
                return scale * right_N
        return None


def find_modes(given: Sequence[Path]) -> list[Path]:
    """The folders that hold a mode.json, of runs, of --out folders and of modes; each once."""
    found: dict[Path, Path] = {}
    for folder in given:
        places = [folder / BENCHMARKS, folder] if (folder / BENCHMARKS).is_dir() else [folder]
        modes = [path.parent for place in places for path in sorted(place.glob(f"*/{MODE}"))]
        if (folder / MODE).is_file():
            modes = [folder]
        if not modes:
            there = "holds no benchmarks" if folder.is_dir() else "is not there"
            raise DataError(
                f"{folder} {there}: run `gemoe benchmark answer` and `gemoe benchmark score` on "
                f"the run first, or give the folder that --out named (it holds MODE/{MODE})"
            )
        for mode in modes:
            found.setdefault(mode.resolve(), mode)
    return list(found.values())


def read_modes(given: Sequence[Path]) -> list[ModeRun]:
    """All that is in these folders; the same way to route in several is one."""
    merged: dict[Key, ModeRun] = {}
    for folder in find_modes(given):
        run = _read(folder)
        if run.key in merged:
            _add(merged[run.key], run)
        else:
            merged[run.key] = run
    found = list(merged.values())
    if not any(run.tasks for run in found):
        raise DataError(
            f"nothing in {', '.join(str(run.folder) for run in found[:3])} is scored: run `gemoe "
            "benchmark score` on it first"
        )
    for run in found:
        run.routing  # noqa: B018  (read now: a file that is damaged ends this before any work)
    return found


def _read(folder: Path) -> ModeRun:
    run = ModeRun(read_mode(folder), folder, {})
    for task in sorted(path for path in folder.iterdir() if path.is_dir()):
        if (task / SCORES).is_file():
            run.tasks[task.name] = _answered(task)
        elif (task / ANSWERS).is_file():
            run.unscored.append(task.name)
    return run


def _answered(folder: Path) -> Answered:
    scores = read_scores(folder)
    documents = read_scored(folder, scores.num_documents)
    return Answered(folder, scores, documents, read_shown(folder))


def _add(first: ModeRun, second: ModeRun) -> None:
    """Tasks that `first` lacks; a task of both must have the same scores."""
    trained, other = first.mode.checkpoint, second.mode.checkpoint
    digests = first.mode.trained_digest, second.mode.trained_digest
    if digests[0] != digests[1] if all(digests) else trained != other:
        raise DataError(
            f"{first.folder} ({trained}) and {second.folder} ({other}) are two trainings of one "
            "method with one seed: they cannot share a row; give one of them, answer one with "
            "another --name, or train it again with another seed"
        )
    for task, answered in second.tasks.items():
        known = first.tasks.setdefault(task, answered)
        if known.scores.metrics != answered.scores.metrics:
            raise DataError(
                f"{known.folder} and {answered.folder} are the same way to route with other "
                "scores: give the folders of modes (RUN/benchmarks/MODE) that belong in the table"
            )
    first.unscored = sorted({*first.unscored, *second.unscored} - first.tasks.keys())


def check_comparable(runs: Sequence[ModeRun]) -> None:
    """DataError unless every task that several have was asked and scored alike."""
    first: dict[str, Answered] = {}
    for run in runs:
        for task, answered in run.tasks.items():
            known = first.setdefault(task, answered)
            for name in ("harness", "version", "num_documents", "choices"):
                here, there = getattr(answered.scores, name), getattr(known.scores, name)
                if here != there:
                    raise DataError(
                        f"{answered.folder} has {name} = {here}, {known.folder} has {there}: they "
                        "cannot share a column; answer and score both alike"
                    )
            if not np.array_equal(answered.documents.doc_id_N, known.documents.doc_id_N):
                raise DataError(
                    f"{answered.folder} and {known.folder} answered other documents: answer both "
                    "with the same data"
                )
