"""Rows as they lie on disk, in order, as dicts; read anew each time that they are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from gemoe_ds.data.sources.packed import unpacked_name
from gemoe_ds.errors import DataError
from gemoe_ds.registry import Registered

_HUB_NAME = re.compile(r"[\w.\-]+/[\w.\-]+")


class Store(Registered):
    """One way to keep rows. A subclass sets `name` and `title`, sees its files and reads them."""

    title: ClassVar[str]  # what `reads as:` says
    rank: ClassVar[int] = 0  # of two that see a path, the higher one reads it
    is_cheap: ClassVar[bool] = True  # to read all rows once more, without their pictures

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
        raise NotImplementedError

    def remark(self) -> str:
        """What of the path is read and what is not, if that is not all."""
        return ""

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


def with_suffix(path: Path, *suffixes: str) -> list[Path]:
    """The file, or the files of a folder and below in the order of their names, that end so, packed
    or not (packed.py). What begins with a dot is of other programs: copies, the like of thumbnails.
    """
    if path.is_file():
        return [path] if unpacked_name(path).endswith(suffixes) else []
    found = (below for below in path.rglob("*") if unpacked_name(below).endswith(suffixes))
    return sorted(b for b in found if b.is_file() and not _is_hidden(b.relative_to(path)))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def begins_with(path: Path, *begins: bytes) -> bool:
    """Whether a file does, whatever its name."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(8).startswith(begins)
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror}") from None


def _hub_hint(path: Path) -> str:
    if not _HUB_NAME.fullmatch(str(path)):
        return ""
    return (
        f"; nothing is downloaded here: hf download --repo-type dataset {path} --local-dir "
        f"{path.name}, then give {path.name}"
    )
