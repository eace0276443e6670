"""A user's JSON file, read whole. If it is something else, one line says what, and the way out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gemoe_ds.errors import DataError

_BINARY = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
}
_SPACE = re.compile(r"\s*")


def read_json(path: Path, kind: type) -> Any:
    """A JSON file whose top level is a list or a dict; DataError otherwise."""
    text = _text(path)
    try:
        content, end = json.JSONDecoder().raw_decode(text, _after_space(text, 0))
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        hint = "; the file ends too early: was it downloaded whole?" if cut else ""
        raise DataError(f"{path}: not valid JSON: {error}{hint}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        raise DataError(f"{path}: not valid JSON: {error}") from None
    start = _after_space(text, end)
    if start < len(text):
        raise DataError(f"{path}: {_several(path, content, text, start)}")
    if not isinstance(content, kind):
        got = type(content).__name__
        where = _list_in(path, content) if kind is list and isinstance(content, dict) else ""
        raise DataError(f"{path}: expected a JSON {kind.__name__}, got {got}{where}")
    return content


def _text(path: Path) -> str:
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror}") from None
    for begin, name in _BINARY.items():
        if stored.startswith(begin):
            raise DataError(f"{path}: not valid JSON: it is {name}; give the JSON that it holds")
    if stored.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(
            f"{path}: not valid JSON: it is UTF-16; "
            f"iconv -f UTF-16 -t UTF-8 {path} > utf8.json writes it as UTF-8"
        )
    try:
        text = stored.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not valid JSON: it is not UTF-8: {error}") from None
    if _after_space(text, 0) == len(text):
        raise DataError(f"{path}: not valid JSON: it is empty")
    return text


def _after_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    assert match is not None
    return match.end()


def _several(path: Path, first: Any, text: str, start: int) -> str:
    """What a file is whose first value ends before `start`."""
    try:
        second, _ = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        line = text.count("\n", 0, start) + 1
        more = text[start : start + 40]
        return f"not valid JSON: behind its end, in line {line}, stands {more!r}"
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
    if "conversations" in content or "messages" in content:
        return ": it is one row; put it in [ ]"
    lists = [key for key, value in content.items() if isinstance(value, list)]
    if len(lists) == 1:
        key = json.dumps(lists[0])
        return f": the list is under {key}; jq '.[{key}]' {path} > rows.json takes it out"
    if content and all(isinstance(value, dict) for value in content.values()):
        return f": the rows are its values; jq '[.[]]' {path} > rows.json makes a list of them"
    return f": its keys are {', '.join(content)}"[:100]
