"""CSV and TSV: a file or a folder of them, packed or not; the first line has the keys."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from gemoe_ds.data.sources.packed import unpacked_name
from gemoe_ds.data.sources.stores.base import Store
from gemoe_ds.data.sources.stores.files import has_rows, opened_text, with_suffix
from gemoe_ds.data.sources.unusable import Unusable
from gemoe_ds.errors import DataError

_ENDINGS = (".csv", ".tsv")
_LONGEST = 2**31 - 1  # characters of a cell


class CsvFiles(Store):
    """Rows of texts; of an empty cell nothing is read."""

    name: ClassVar[str] = "csv"
    title: ClassVar[str] = "CSV or TSV"
    options: ClassVar[frozenset[str]] = frozenset({"--split"})

    @classmethod
    def sees(cls, path: Path) -> bool:
        return bool(with_suffix(path, *_ENDINGS)) and not has_rows(path)

    def files(self) -> list[Path]:
        return self._with_suffix(*_ENDINGS)

    def rows_of(self, file: Path) -> Iterator[Any]:
        csv.field_size_limit(_LONGEST)
        mark = "\t" if unpacked_name(file).endswith(".tsv") else ","
        try:
            with opened_text(file, newline="") as text:
                lines = csv.reader(text, delimiter=mark, strict=True)
                keys = _keys(file, next(lines, []))
                for cells in filter(None, lines):
                    if len(cells) == len(keys):
                        yield dict(zip(keys, cells, strict=True))
                    else:
                        yield Unusable(
                            "not a row",
                            f"the row up to line {lines.line_num} of {file.name} has {len(cells)} "
                            f"cells, and the first line {len(keys)}",
                        )
        except csv.Error as error:
            raise DataError(f"{file}: line {lines.line_num}: {error}") from None


def _keys(file: Path, found: list[str]) -> list[str]:
    if twice := [key for key in found if found.count(key) > 1]:
        raise DataError(f"{file}: its first line has the key {twice[0]!r} twice")
    return found
