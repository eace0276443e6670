"""The settings of every row and training set, chosen on validation among equally many for each.

A setting is as good as its accuracy is above that of the untouched model with static k, at the
mean k that it came out with. So settings that end at different k can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from experiments.compare.answers import Trial, Tried
from experiments.compare.grid import Grid, Setting
from experiments.compare.jobs import Job, Training, chosen_for
from experiments.steps import Progress
from gemoe_ds.analysis.record import read_record
from gemoe_ds.errors import ConfigError
from gemoe_ds.files import write_text

SETS: tuple[Training, ...] = ("mixed", "captions")
_FILE = TypeAdapter(dict[str, Tried])


def record_of(grid_file: Path) -> Path:
    """Where the trials of a grid are written: beside it."""
    return grid_file.with_name(f"{grid_file.stem}_trials.json")


def choose(grid: Grid, jobs: Sequence[Job], progress: Progress) -> dict[str, Tried]:
    """By row and training set: all trials, and which one is taken. Where all are done."""
    jobs = [job for job in jobs if progress.is_done(job.step)]
    static = [r for job in jobs if grid.rows[job.row].is_static for r in job.records]
    if not static:
        return {}
    points = sorted((r.mean_k, r.accuracy) for r, _ in map(read_record, static))
    k_P, accuracy_P = np.array(points).T
    found: dict[str, list[Trial]] = {}
    for job in jobs:
        row = grid.rows[job.row]
        if row.is_static:
            continue
        record, _ = read_record(job.records[0])
        assert job.where.trial is not None
        trial = Trial(
            setting=row.trials[job.where.trial],
            mean_k=record.mean_k,
            accuracy=record.accuracy,
            above_static=record.accuracy - float(np.interp(record.mean_k, k_P, accuracy_P)),
        )
        found.setdefault(chosen_for(job.row, job.where.training), []).append(trial)
    return {
        name: Tried(
            trials=tuple(trials),
            taken=max(range(len(trials)), key=lambda i: trials[i].above_static),
        )
        for name, trials in found.items()
        if len(trials) == grid.trials_each
    }


def write_trials(path: Path, tried: Mapping[str, Tried]) -> None:
    write_text(path, _FILE.dump_json(dict(tried), indent=1).decode() + "\n")


def read_trials(path: Path, grid: Grid) -> dict[str, Tried]:
    """Of rows whose trials are still those of the grid; ConfigError if the file is damaged."""
    if not path.exists():
        return {}
    try:
        read = _FILE.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path} is damaged ({reason}): run --trials again") from None
    return {
        key: read[key]
        for name, row in grid.rows.items()
        for key in (chosen_for(name, training) for training in SETS)
        if key in read
        and [_text(trial.setting) for trial in read[key].trials] == [*map(_text, row.trials)]
    }


def _text(setting: Setting) -> str:
    return json.dumps(setting, sort_keys=True)


def taken(tried: Mapping[str, Tried]) -> dict[str, Setting]:
    return {name: found.trials[found.taken].setting for name, found in tried.items()}
