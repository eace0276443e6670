"""Files that their names say a split of: train.jsonl, val-000.tar, test/0.csv."""

from __future__ import annotations

import re
from pathlib import Path

from gemoe_ds.errors import DataError

_WORD = re.compile(
    "(?:^|[^a-z])(train|training|validation|valid|val|dev|test|testing|eval)(?![a-z])"
)


def split_of(file: Path) -> str:
    """What a file's name says, or else the name of the nearest folder that does; or nothing."""
    words = (_WORD.search(part.lower()) for part in reversed(file.parts))
    return next((word[1] for word in words if word), "")


def of_split(path: Path, files: list[Path], asked: str | None) -> list[Path]:
    """The files of `path` that the split has: all if none is asked for, and not several are there.

    DataError if the split that is asked for is not there, or several are and none is asked for.
    """
    inside = path if path.is_dir() else path.parent
    splits = {file: split_of(file.relative_to(inside)) for file in files}
    known = sorted({split for split in splits.values() if split})
    if asked is None and len(known) < 2:
        return files
    if asked is None or asked not in known:
        said = f"--split {asked}: no such split" if asked else "give --split"
        what = ", ".join(known) or "none: no name says one, as train.jsonl and test/0.tar do"
        raise DataError(f"{path}: {said}; it has {what}")
    return [file for file in files if splits[file] == asked]
