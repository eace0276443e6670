"""JSON lists and JSON lines: a file, or a folder of JSON lines; packed or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from gemoe_ds.data.sources import json_rows
from gemoe_ds.data.sources.json_file import read_json
from gemoe_ds.data.sources.packed import unpacked_name
from gemoe_ds.data.sources.stores.base import Store
from gemoe_ds.data.sources.stores.files import with_suffix
from gemoe_ds.data.sources.stores.splits import of_split
from gemoe_ds.errors import DataError

_LINES = (".jsonl", ".ndjson", ".jsonlines")


class JsonList(Store):
    """One file that is one list, whatever its name: the last store to be asked."""

    name: ClassVar[str] = "json"
    title: ClassVar[str] = "a JSON list"
    rank: ClassVar[int] = -10

    @classmethod
    def sees(cls, path: Path) -> bool:
        return path.is_file() or len(with_suffix(path, ".json")) == 1

    def files(self) -> list[Path]:
        return [self.path] if self.path.is_file() else with_suffix(self.path, ".json")

    def rows_of(self, file: Path) -> Iterator[Any]:
        if json_rows.first_character(file) != "[":
            read_json(file, list)  # which says what it is
            raise DataError(f"{file}: not a JSON list")
        return json_rows.list_items(file)


class JsonLines(Store):
    """Files of values one behind the other; a folder of them is read in the order of the names."""

    name: ClassVar[str] = "json_lines"
    title: ClassVar[str] = "JSON lines"
    rank: ClassVar[int] = 1
    options: ClassVar[frozenset[str]] = frozenset({"--split"})

    @classmethod
    def sees(cls, path: Path) -> bool:
        if with_suffix(path, *_LINES):
            return path.is_file() or not with_suffix(path, ".parquet", ".arrow", ".tar")
        if not path.is_file() or Path(unpacked_name(path)).suffix not in (".json", ""):
            return False
        return _has_two_objects(path)

    def files(self) -> list[Path]:
        if self.path.is_file():  # whatever its name
            return of_split(self.path, [self.path], self.split)
        return self._with_suffix(*_LINES)

    def rows_of(self, file: Path) -> Iterator[Any]:
        is_list = json_rows.first_character(file) == "["
        return json_rows.list_items(file) if is_list else json_rows.lines(file)


def _has_two_objects(path: Path) -> bool:
    """Whether a file begins with an object and goes on behind it."""
    try:
        if json_rows.first_character(path) != "{":
            return False
        values = json_rows.lines(path)
        return isinstance(next(values), dict) and next(values, None) is not None
    except DataError:
        return False
