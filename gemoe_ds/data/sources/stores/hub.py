"""Tables that `datasets` reads: parquet, arrow, `save_to_disk` folders, copies of a hub's data set.

Pictures stay as they are stored; rows are read one after the other, and nothing is copied into the
library's cache.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from gemoe_ds.data.sources.stores.base import Store, begins_with, with_suffix
from gemoe_ds.errors import DataError

_SAVED = ("state.json", "dataset_dict.json")
_TABLES = (".parquet", ".arrow")


class Hub(Store):
    """One split of a data set: its only one, or `train`, or the one that is asked for."""

    name: ClassVar[str] = "hub"
    title: ClassVar[str] = "a table (parquet, arrow, save_to_disk, a copy from the hub)"
    rank: ClassVar[int] = 3
    is_cheap: ClassVar[bool] = False

    @classmethod
    def sees(cls, path: Path) -> bool:
        if path.is_file():
            return begins_with(path, b"PAR1", b"ARROW1") or path.suffix == ".arrow"
        return any((path / name).is_file() for name in _SAVED) or bool(with_suffix(path, *_TABLES))

    def files(self) -> list[Path]:
        return with_suffix(self.path, *_TABLES, ".json", ".jsonl", ".md")

    def rows(self) -> Iterator[Any]:
        try:
            with _quiet():
                yield from self._opened()
        except DataError:
            raise
        except Exception as error:  # of any kind, from files that may hold anything
            said = " ".join(str(error).split())[:200]
            raise DataError(f"{self.path}: `datasets` cannot read it: {said}") from error

    def _opened(self) -> Any:
        import datasets

        if any((self.path / name).is_file() for name in _SAVED):
            saved = datasets.load_from_disk(str(self.path))
            if isinstance(saved, datasets.DatasetDict):
                saved = saved[self._chosen(list(saved))]
            return saved.to_iterable_dataset().decode(False)
        if self.path.is_file():
            kind = "parquet" if begins_with(self.path, b"PAR1") else "arrow"
            table = datasets.load_dataset(kind, data_files=str(self.path), streaming=True)
        else:
            table = datasets.load_dataset(str(self.path), streaming=True)
        return table[self._chosen(list(table))].decode(False)

    def _chosen(self, splits: list[str]) -> str:
        if self.split in splits:
            return str(self.split)
        if self.split is None and len(splits) == 1:
            return splits[0]
        asked = f"--split {self.split}: no such split" if self.split else "give --split"
        raise DataError(f"{self.path}: {asked}; it has {', '.join(splits)}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without bars and warnings of the library."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
