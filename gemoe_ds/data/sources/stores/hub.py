"""Tables that `datasets` reads: parquet, arrow, `save_to_disk` folders, copies of a hub's data set.

Pictures stay as they are stored; rows are read one after the other, and nothing is copied into the
library's cache.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from gemoe_ds.data.sources.stores.base import Store
from gemoe_ds.data.sources.stores.files import begins_with, stem_of, with_suffix
from gemoe_ds.data.sources.stores.splits import split_of
from gemoe_ds.errors import DataError

_SAVED = ("state.json", "dataset_dict.json")
_TABLES = (".parquet", ".arrow")


class Hub(Store):
    """One split of one configuration of a data set: its only one, or the one that is asked for."""

    name: ClassVar[str] = "hub"
    title: ClassVar[str] = "a table (parquet, arrow, save_to_disk, a copy from the hub)"
    rank: ClassVar[int] = 3
    is_cheap: ClassVar[bool] = False
    options: ClassVar[frozenset[str]] = frozenset({"--split", "--config"})

    @classmethod
    def sees(cls, path: Path) -> bool:
        if path.is_file():
            return begins_with(path, b"PAR1", b"ARROW1") or path.suffix == ".arrow"
        if any((path / name).is_file() for name in _SAVED):
            return True
        tables = with_suffix(path, *_TABLES)
        return bool(tables) and not _of_tars(path, tables)

    def files(self) -> list[Path]:
        return with_suffix(self.path, *_TABLES, ".json", ".jsonl", ".md")

    def placed_rows(self) -> Iterator[tuple[Path, Any]]:
        self._check_ends()
        number = 0
        try:
            with self._named():
                for row in self._opened():
                    yield self.folder, row
                    number += 1
        except _Unreadable as error:
            raise DataError(f"{error} (behind {number} rows)") from error

    def read_files(self) -> list[Path]:
        with self._named():
            return self._splits[self._split(list(self._splits))]

    def _which(self) -> str:
        with self._named():
            split = self._split(list(self._splits))
        return f"split {split}" + (f" of {self.config}" if self.config else "")

    def _check_ends(self) -> None:
        """DataError for a parquet file that was cut short, before a row of another is read."""
        for file in with_suffix(self.path, ".parquet"):
            if not (begins_with(file, b"PAR1") and _last(file, 4) == b"PAR1"):
                raise DataError(
                    f"{file}: `datasets` cannot read it: it is no whole parquet file; was it "
                    "downloaded whole?"
                )

    def _opened(self) -> Any:
        import datasets

        if self.path.is_dir():
            split = self._split(list(self._splits))
            if (saved := self._saved()) is None:
                return self._builder().as_streaming_dataset(split).decode(False)
            one = saved[split] if isinstance(saved, dict) else saved
            return one.to_iterable_dataset().decode(False)
        self._split([split_of(Path(self.path.name)) or "train"])
        self._no_config()
        kind = "parquet" if begins_with(self.path, b"PAR1") else "arrow"
        files = {"train": str(self.path)}
        return datasets.load_dataset(kind, data_files=files, split="train", streaming=True).decode(
            False
        )

    @functools.cached_property
    def _splits(self) -> dict[str, list[Path]]:
        """The files of each split of a folder."""
        if (saved := self._saved()) is None:
            found = self._builder().config.data_files
            return {str(split): [Path(file) for file in files] for split, files in found.items()}
        sets = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
        return {
            split: [Path(file["filename"]) for file in one.cache_files]
            for split, one in sets.items()
        }

    def _saved(self) -> Any:
        """What `save_to_disk` has written; None for another folder."""
        import datasets

        if not any((self.path / name).is_file() for name in _SAVED):
            return None
        self._no_config()
        return datasets.load_from_disk(str(self.path))

    def _builder(self) -> Any:
        """What `datasets` takes a folder for."""
        import datasets

        folder = str(self.path.absolute())  # `.` has no name for it
        tables = with_suffix(self.path, *_TABLES)
        if all(table.suffix not in _TABLES for table in tables):  # capitals, which it does not know
            self._no_config()
            kind = "parquet" if begins_with(tables[0], b"PAR1") else "arrow"
            return datasets.load_dataset_builder(kind, data_files=list(map(str, tables)))
        configs = datasets.get_dataset_config_names(folder)
        return datasets.load_dataset_builder(folder, self._one_of("config", self.config, configs))

    def _split(self, splits: list[str]) -> str:
        return self._one_of("split", self.split, splits)

    def _no_config(self) -> None:
        if self.config:
            raise DataError(f"{self.path}: --config {self.config}: it has no configurations")

    def _one_of(self, what: str, asked: str | None, known: list[str]) -> str:
        """The one that is asked for, or the only one."""
        if asked in known or (asked is None and len(known) == 1):
            return asked or known[0]
        said = f"--{what} {asked}: no such {what}" if asked else f"give --{what}"
        raise DataError(f"{self.path}: {said}; it has {', '.join(known)}")

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of the library in one line that names the path; none of its bars and warnings."""
        try:
            with _quiet():
                yield
        except DataError:
            raise
        except Exception as error:  # of any kind, from files that may hold anything
            said = " ".join(str(error).split())[:200]
            raise _Unreadable(f"{self.path}: `datasets` cannot read it: {said}") from error


class _Unreadable(DataError):
    """What `datasets` said."""


def _of_tars(path: Path, tables: list[Path]) -> bool:
    """Whether each has a tar of its name beside it: img2dataset writes what is in the tar twice."""
    tars = {stem_of(tar) for tar in with_suffix(path, ".tar", ".tgz")}
    return all(stem_of(table) in tars for table in tables)


def _last(file: Path, number: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(-number, os.SEEK_END)
        return opened.read()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without bars and warnings of the library."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # which are raised as well
    try:
        yield
    finally:
        logging.disable(before)
