"""The values of a JSON list, or of JSON lines, one at a time: a file of any size in little memory.

What is wrong is said as `read_json` says it, with the line and column in the whole file.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gemoe_ds.data.sources.json_file import (
    behind_the_end,
    cannot_read,
    no_key_twice,
    not_json,
    refuse_binary,
)
from gemoe_ds.data.sources.packed import open_unpacked
from gemoe_ds.errors import DataError

_AT_ONCE = 2**20  # bytes that are read together
_SPACE = re.compile(r"[ \t\n\r]*")
# An error this near to the end of what was read may be one of the cut alone.
_MARGIN = 32
_QUOTED = 40  # characters of what stands at an error
_REST = 2**16  # characters, at least, by which what stands behind the end is told


def first_character(path: Path) -> str:
    """That is no white space; empty in an empty file. DataError for what is no text of UTF-8."""
    with _Text(path) as text:
        return text.peek()


def list_items(path: Path) -> Iterator[Any]:
    """The values of a file that is one JSON list; DataError, in its place, for another."""
    with _Text(path) as text:
        if text.peek() != "[":
            raise DataError(f"{path}: not valid JSON: it is no list")
        text.skip(1)
        if text.peek() == "]":
            text.skip(1)
        else:
            while True:
                yield text.value()
                found = text.peek()
                if found not in (",", "]"):
                    raise text.error("Expecting ',' delimiter")
                text.skip(1)
                if found == "]":
                    break
        if more := text.peek():
            rest = "[]" if more == "[" else text.rest()  # a second list may be long
            raise DataError(f"{path}: {behind_the_end(path, [], rest, text.line())}")


def lines(path: Path) -> Iterator[Any]:
    """The values of a file that has them one behind the other, a line each or more.

    A value that is cut takes the lines behind it for its own: an error says where it began.
    """
    with _Text(path) as text:
        while text.peek():
            yield text.value(says_begin=True)


class _Text:
    """A file's text from a place on; what lies before it is forgotten, but for its size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._scan = json.JSONDecoder(object_pairs_hook=no_key_twice).raw_decode
        self._text = ""
        self._at = 0
        self._is_whole = False  # nothing is left in the file
        self._bytes = 0  # read and decoded
        self._lines = 0  # before `_text`
        self._chars = 0
        self._column = 0  # characters of its first line that lie before it

    def __enter__(self) -> _Text:
        try:
            self._file: BinaryIO = open_unpacked(self.path)
            self._more()
        except OSError as error:
            raise cannot_read(self.path, error) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def peek(self) -> str:
        """The next character that is no white space, or nothing; it is where `skip` begins."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text) or self._is_whole:
                return self._text[self._at : self._at + 1]
            self._more()

    def skip(self, number: int) -> None:
        self._at += number

    def value(self, *, says_begin: bool = False) -> Any:
        """The JSON value that begins here; an error says its line if it is another."""
        self.peek()
        while True:
            try:
                value, end = self._scan(self._text, self._at)
            except json.JSONDecodeError as error:
                is_cut = error.pos >= len(self._text) - _MARGIN or "Unterminated" in error.msg
                if self._is_whole or not is_cut:
                    begin = self.line() if says_begin else None
                    raise self.error(error.msg, error.pos, begin) from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self.path}: not valid JSON: {error}") from None
            else:
                # or a number that goes on: what is read of 1e+5 may be 1e+, which scans as 1
                if end + 2 < len(self._text) or self._is_whole:
                    self._at = end
                    return value
            self._more()

    def rest(self) -> str:
        """The beginning of what is left."""
        while not self._is_whole and len(self._text) - self._at < _REST:
            self._more()
        return self._text[self._at :]

    def line(self) -> int:
        """The number of the line here, from 1."""
        return self._lines + self._text.count("\n", 0, self._at) + 1

    def error(self, said: str, at: int | None = None, begin: int | None = None) -> DataError:
        """As `json` words it, of the place in the file; `begin`: the line of the value's begin."""
        at = self._at if at is None else at
        while not self._is_whole and len(self._text) < at + _QUOTED:
            at -= self._at
            self._more()
        start = self._text.rfind("\n", 0, at) + 1
        column = at - start + 1 + (0 if start else self._column)
        line = self._lines + self._text.count("\n", 0, at) + 1
        place = f"{said}: line {line} column {column} (char {self._chars + at})"
        is_last = at >= len(self._text.rstrip()) or said.startswith("Unterminated")
        if begin is not None and begin < line:
            place = f"the value that begins in line {begin} is not whole: {place}"
            is_last = False
        return not_json(self.path, place, self._text[at : at + _QUOTED], is_cut=is_last)

    def _more(self) -> None:
        """Read on. At least as much as is kept, so that a long value is not scanned many times."""
        kept = len(self._text) - self._at
        before = self._text[: self._at]
        if "\n" in before:
            self._lines += before.count("\n")
            self._column = len(before) - before.rfind("\n") - 1
        else:
            self._column += len(before)
        self._chars += len(before)
        read = self._file.read(max(_AT_ONCE, kept))
        if not self._bytes:
            refuse_binary(self.path, read)
        try:
            text = self._decode.decode(read, final=not read)
        except UnicodeDecodeError as error:
            first = self._bytes - (len(error.object) - len(read)) + error.start
            raise DataError(
                f"{self.path}: not valid JSON: it is not UTF-8: byte {first}: {error.reason}"
            ) from None
        self._bytes += len(read)
        self._is_whole = not read
        self._text, self._at = self._text[self._at :] + text, 0
