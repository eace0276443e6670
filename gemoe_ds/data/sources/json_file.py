"""A user's JSON file, read whole. If it is something else, one line says what, and the way out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gemoe_ds.data.sources.packed import open_unpacked
from gemoe_ds.errors import DataError

_BINARY = {
    b"\x1f\x8b": "gzip once more",
    b"PK\x03\x04": "zip",
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
}
_JSON_NAMES: dict[type, str] = {
    **{list: "list", dict: "object", str: "text", bool: "true or false"},
    **{int: "number", float: "number", type(None): "null"},
}
_SPACE = re.compile(r"\s*")


def read_json(path: Path, kind: type) -> Any:
    """A JSON file whose top level is a list or a dict; DataError otherwise."""
    text = _text(path)
    try:
        decoder = json.JSONDecoder(object_pairs_hook=no_key_twice)
        content, end = decoder.raw_decode(text, _after_space(text, 0))
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        found = text[error.pos : error.pos + 40]
        raise not_json(path, str(error), found, is_cut=cut) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        raise DataError(f"{path}: not valid JSON: {error}") from None
    start = _after_space(text, end)
    if start < len(text):
        line = text.count("\n", 0, start) + 1
        raise DataError(f"{path}: {behind_the_end(path, content, text[start:], line)}")
    if not isinstance(content, kind):
        got = _JSON_NAMES[type(content)]
        where = _list_in(path, content) if kind is list and isinstance(content, dict) else ""
        raise DataError(f"{path}: expected a JSON {_JSON_NAMES[kind]}, got {got}{where}")
    return content


def not_json(path: Path, said: str, found: str, *, is_cut: bool) -> DataError:
    """`said`: what is wrong, and where; `found`: what stands there."""
    hint = "; the file ends too early: was it downloaded whole?" if is_cut else ""
    if found:
        hint = f", where {found!r} stands{hint}"
    return DataError(f"{path}: not valid JSON: {said}{hint}")


def cannot_read(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot read it: {error.strerror}")


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of two values under one key Python would take the last without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in {str(found)[:60]}...")
    return found


def _text(path: Path) -> str:
    try:
        with open_unpacked(path) as file:
            stored = file.read()
    except OSError as error:
        raise cannot_read(path, error) from None
    refuse_binary(path, stored)
    try:
        text = stored.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not valid JSON: it is not UTF-8: {error}") from None
    if _after_space(text, 0) == len(text):
        raise DataError(f"{path}: not valid JSON: it is empty")
    return text


def refuse_binary(path: Path, stored: bytes) -> None:
    """DataError that names what it is, by how it begins, if that is no text of UTF-8."""
    for begin, name in _BINARY.items():
        if stored.startswith(begin):
            raise DataError(f"{path}: not valid JSON: it is {name}; give the JSON that it holds")
    if stored.startswith(b"version https://git-lfs"):
        raise DataError(
            f"{path}: not valid JSON: it is Git LFS's pointer to the file; git lfs pull fetches it"
        )
    if stored.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        is_32 = stored.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff"))
        name = "UTF-32" if is_32 else "UTF-16"
        raise DataError(
            f"{path}: not valid JSON: it is {name}; "
            f"iconv -f {name} -t UTF-8 {path} > utf8.json writes it as UTF-8"
        )


def _after_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    assert match is not None
    return match.end()


def behind_the_end(path: Path, first: Any, rest: str, line: int) -> str:
    """What a file is whose first value is followed by `rest`, or its beginning, in `line`."""
    try:
        second, _ = json.JSONDecoder().raw_decode(rest)
    except (ValueError, RecursionError):
        return f"not valid JSON: behind its end, in line {line}, stands {rest[:40]!r}"
    if isinstance(first, list) and isinstance(second, list):
        return (
            "it is several JSON lists, one behind the other; "
            f"jq -s add {path} > rows.json makes one list of them"
        )
    return (
        "it is JSON lines (values one behind the other), not one list; "
        f"jq -s . {path} > rows.json makes one list of them"
    )


def _list_in(path: Path, content: dict[str, Any]) -> str:
    """Where the list probably is in an object."""
    turns = content.get("conversations", content.get("messages"))
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        return ": it is one row; put it in [ ]"
    lists = [key for key, value in content.items() if isinstance(value, list)]
    if len(lists) == 1:
        key = json.dumps(lists[0])
        return f": the list is under {key}; jq '.[{key}]' {path} > rows.json takes it out"
    if content and all(isinstance(value, dict) for value in content.values()):
        return f": the rows are its values; jq '[.[]]' {path} > rows.json makes a list of them"
    return f": its keys are {', '.join(content)}"[:100]
