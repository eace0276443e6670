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
    """One stage's last whole run."""

    source: str
    command: str
    commit: str
    machine: str
    date: str
    seconds: float


def read_ran(folder: Path) -> dict[str, Ran]:
    """By the stage's name; empty where none has run."""
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        return {name: Ran(**row) for name, row in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no record of stages: {error}; remove it") from error


def note_ran(
    folder: Path, stage: Stage, source: str, begun: Mapping[str, str], seconds: float
) -> None:
    """Add a stage, with the provenance of its beginning."""
    where = {key: begun[key] for key in ("commit", "machine", "date")}
    ran = Ran(source, stage.command, **where, seconds=round(seconds, 1))
    rows = read_ran(folder) | {stage.name: ran}
    told = {name: dataclasses.asdict(row) for name, row in rows.items()}
    write_text(folder / FILE, json.dumps(told, indent=1) + "\n")


def beginning() -> dict[str, str]:
    """Commit, machine and date, before a stage's own results make the checkout dirty."""
    return {key: str(value or "") for key, value in provenance().items()}
