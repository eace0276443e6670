"""Files that may be packed by gzip, bzip2, xz or zstd, whatever their names: their content."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from gemoe_ds.errors import DataError

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
_OPENED: tuple[tuple[bytes, Callable[[Path], Any]], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ", lzma.open),
    (b"\x28\xb5\x2f\xfd", lambda path: pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")),
)
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)


class _Unpacked(io.RawIOBase):
    """A stream whose errors name the file."""

    def __init__(self, path: Path, stream: Any) -> None:
        self._path, self._stream = path, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            found = self._stream.read(len(buffer))
        except _BROKEN as error:
            raise DataError(
                f"{self._path}: it cannot be unpacked: {error}; was it downloaded whole?"
            ) from None
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        self._stream.close()
        super().close()


def open_unpacked(path: Path) -> BinaryIO:
    """The content of a file, to be read from its beginning on. OSError as `open` raises it, while
    it is read DataError for what is packed and not whole."""
    with path.open("rb") as file:
        begin = file.read(8)
    for mark, opened in _OPENED:
        if begin.startswith(mark):
            return cast(BinaryIO, io.BufferedReader(_Unpacked(path, opened(path)), 2**18))
    return path.open("rb")


def unpacked_name(path: Path) -> str:
    """The name in small letters, without the ending of what packs it."""
    name = path.name.lower()
    return name.removesuffix(next((s for s in SUFFIXES if name.endswith(s)), ""))
