"""Rows as they lie on disk, in order, as dicts; read anew each time that they are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from gemoe_ds.data.sources.stores.files import with_suffix
from gemoe_ds.data.sources.stores.splits import of_split
from gemoe_ds.errors import DataError
from gemoe_ds.registry import Registered

_HUB_NAME = re.compile(r"[\w.\-]+/[\w.\-]+")
# What may hold rows: a file that ends so and is not read is said.
_DATA = (
    *(".parquet", ".arrow", ".tar", ".tgz", ".zip", ".csv", ".tsv", ".txt"),
    *(".json", ".jsonl", ".ndjson", ".jsonlines"),
)
# Of `datasets`: they say what other files are.
_NO_DATA = ("state.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json")


class Store(Registered):
    """One way to keep rows. A subclass sets `name` and `title`, sees its files and reads them."""

    title: ClassVar[str]  # what `reads as:` says
    rank: ClassVar[int] = 0  # of two that see a path, the higher one reads it
    is_cheap: ClassVar[bool] = True  # to read all rows once more, without their pictures
    options: ClassVar[frozenset[str]] = frozenset()  # of --split, --config, --documents: it has

    def __init__(
        self,
        path: Path,
        *,
        split: str | None = None,
        config: str | None = None,
        documents: str = "file",
    ) -> None:
        """`split`, `config`: of a set that has several; `documents`: what of a text file is one."""
        self.path, self.split, self.config, self.documents = path, split, config, documents

    @classmethod
    def sees(cls, path: Path) -> bool:
        """Whether this class reads the path, which exists."""
        raise NotImplementedError

    def files(self) -> list[Path]:
        """All that the rows are read from: size and time of each say if it is still the same."""
        raise NotImplementedError

    def rows(self) -> Iterator[Any]:
        """All of them; an Unusable in the place of a row that is none, DataError for a file."""
        return (row for _, row in self.placed_rows())

    def placed_rows(self) -> Iterator[tuple[Path, Any]]:
        """The same, each with the folder of its file, where pictures that it names may lie."""
        for file in self.files():
            for row in self.rows_of(file):
                yield file.parent, row

    def rows_of(self, file: Path) -> Iterator[Any]:
        """Those of one of `files`."""
        raise NotImplementedError

    def remark(self) -> str:
        """What of the folder is read and what is not, if that is not all."""
        if not self.path.is_dir():
            return ""
        read = self.read_files()
        known = {file.resolve() for file in read}
        there = [file for file in with_suffix(self.path, *_DATA) if file.name not in _NO_DATA]
        left = [file for file in there if file.resolve() not in known]
        if not left:
            return ""
        split = f"{which}: {len(read)} files; " if (which := self._which()) else ""
        return f"{split}not read: {len(left)} files, {left[0].relative_to(self.path)} first"

    def _which(self) -> str:
        """The split that is read, if the set has splits."""
        return f"split {self.split}" if self.split else ""

    def read_files(self) -> list[Path]:
        """Those of `files` that hold the rows."""
        return self.files()

    def _with_suffix(self, *suffixes: str) -> list[Path]:
        """The files of the split that end so."""
        return of_split(self.path, with_suffix(self.path, *suffixes), self.split)

    @property
    def folder(self) -> Path:
        """Where the files lie that rows name, if nothing else is said."""
        return self.path if self.path.is_dir() else self.path.parent


def open_store(path: Path, **options: Any) -> Store:
    """What the path is. DataError, one line with the way out, if nothing here reads it."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder{_hub_hint(path)}")
    for store in sorted(Store.known(), key=lambda known: -known.rank):
        if store.sees(path):
            return store(path, **options)
    if files := with_suffix(path, ".json"):
        raise DataError(f"{path}: it has {len(files)} JSON files; give one, such as {files[0]}")
    titles = ", ".join(store.title for store in Store.known())
    what = "a folder with" if path.is_dir() else "a file of"
    raise DataError(f"{path}: it is {what} none of these: {titles}")


def _hub_hint(path: Path) -> str:
    if not _HUB_NAME.fullmatch(str(path)):
        return ""
    return (
        f"; nothing is downloaded here: hf download --repo-type dataset {path} --local-dir "
        f"{path.name}, then give {path.name}"
    )
