"""The files of results/ as claims read them; notes which were read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemoe_ds.errors import DataError

Row = dict[str, Any]


class Results:
    """A folder of results. `read` names what was asked for since it was made, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read: list[str] = []

    def text(self, name: str) -> str:
        """A file as it is; `name` is a path within the folder."""
        if name not in self.read:
            self.read.append(name)
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"{self.folder / name} cannot be read: {error}") from error

    def json(self, name: str) -> Any:
        try:
            return json.loads(self.text(name))
        except ValueError as error:
            raise DataError(f"{self.folder / name} is no JSON: {error}") from error

    def rows(self, name: str, key: str = "rows", /, **equal: object) -> list[Row]:
        """The rows of a file's list `key` in which these columns have these values."""
        found: list[Row] = self.json(name)[key]
        return [row for row in found if all(row.get(k) == v for k, v in equal.items())]

    def row(self, name: str, key: str = "rows", /, **equal: object) -> Row:
        """The one row of `rows`."""
        found = self.rows(name, key, **equal)
        if len(found) != 1:
            raise DataError(f"{self.folder / name}: {len(found)} rows of {key} with {equal}, not 1")
        return found[0]
