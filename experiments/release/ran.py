"""results/stages.json: which stage ran last, on which state of the source, where and when."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.release.stages import Stage
from gemoe_ds.analysis.provenance import provenance
from gemoe_ds.errors import DataError
from gemoe_ds.files import write_text

FILE = "stages.json"


@dataclass(frozen=True)
class Ran:
    """One stage's last run. seconds: none while it has not ended."""

    source: str
    command: str
    commit: str
    machine: str
    date: str
    seconds: float | None = None


def read_ran(folder: Path) -> dict[str, Ran]:
    """By the stage's name; empty where none has run."""
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        return {name: Ran(**row) for name, row in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no record of stages: {error}; remove it") from error


def has_ended(ran: Mapping[str, Ran], stage: Stage, source: str) -> bool:
    """Whether a stage has run to its end on this source."""
    row = ran.get(stage.name)
    return row is not None and row.source == source and row.seconds is not None


def note_begun(folder: Path, stage: Stage, source: str) -> Ran:
    """The stage's row from now on, with the provenance of this moment."""
    begun = provenance()
    commit, machine, date = (str(begun[key] or "") for key in ("commit", "machine", "date"))
    row = Ran(source, stage.command, commit, machine, date)
    _write(folder, stage, row)
    return row


def note_ended(folder: Path, stage: Stage, row: Ran, seconds: float) -> None:
    """`seconds`: of the last try."""
    _write(folder, stage, dataclasses.replace(row, seconds=round(seconds, 1)))


def _write(folder: Path, stage: Stage, row: Ran) -> None:
    told = {name: dataclasses.asdict(one) for name, one in read_ran(folder).items()}
    told[stage.name] = dataclasses.asdict(row)
    write_text(folder / FILE, json.dumps(told, indent=1) + "\n")
