"""Files of a folder by their endings, and what a file begins with."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from gemoe_ds.data.sources.packed import open_unpacked, unpacked_name
from gemoe_ds.errors import DataError

_ROWS = (".tar", ".parquet", ".arrow", ".json", ".jsonl")


def with_suffix(path: Path, *suffixes: str) -> list[Path]:
    """The file, or the files of a folder and below in the order of their names, that end so, packed
    or not (packed.py). What begins with a dot is of other programs: copies, the like of thumbnails.
    """
    if path.is_file():
        return [path] if unpacked_name(path).endswith(suffixes) else []
    return sorted(file for file in _below(path, suffixes) if file.is_file())


def has_rows(path: Path) -> bool:
    """Whether it is a folder with files that are read before .csv and .txt."""
    return path.is_dir() and bool(with_suffix(path, *_ROWS))


@contextmanager
def opened_text(file: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A text of UTF-8, packed or not; DataError for what goes wrong while it is read."""
    try:
        with io.TextIOWrapper(open_unpacked(file), encoding="utf-8-sig", newline=newline) as text:
            yield text
    except OSError as error:
        raise DataError(f"{file}: cannot read it: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: it is no text of UTF-8: {error}") from None


def _below(top: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Also behind links to folders, after all else; no folder twice, and none that holds `top`."""
    whole, seen = top.resolve(), set[str]()
    folders = deque([str(top)])
    while folders:
        for where, inner, names in os.walk(folders.popleft(), onerror=_unreadable):
            real = os.path.realpath(where)
            if real in seen or (whole != Path(real) and whole.is_relative_to(real)):
                inner.clear()
                continue
            seen.add(real)
            inner[:] = [name for name in inner if not _is_hidden(name)]
            inside = (os.path.join(where, name) for name in inner)
            folders += sorted(folder for folder in inside if os.path.islink(folder))
            found = (Path(where, name) for name in names if not _is_hidden(name))
            yield from (file for file in found if unpacked_name(file).endswith(suffixes))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot read the folder: {error.strerror}") from None


def begins_with(path: Path, *begins: bytes) -> bool:
    """Whether a file does, whatever its name."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(8).startswith(begins)
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror}") from None


def stem_of(file: Path) -> Path:
    """The path without its ending and that of what packs it, the name in small letters."""
    return file.parent / unpacked_name(file).rpartition(".")[0]
