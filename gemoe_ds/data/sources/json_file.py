"""A user's JSON file, read whole. If it is something else, one line says what, and the way out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gemoe_ds.errors import DataError

_BINARY = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
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
        decoder = json.JSONDecoder(object_pairs_hook=_once)
        content, end = decoder.raw_decode(text, _after_space(text, 0))
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        hint = "; the file ends too early: was it downloaded whole?" if cut else ""
        if found := text[error.pos : error.pos + 40]:
            hint = f", where {found!r} stands{hint}"
        raise DataError(f"{path}: not valid JSON: {error}{hint}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        raise DataError(f"{path}: not valid JSON: {error}") from None
    start = _after_space(text, end)
    if start < len(text):
        raise DataError(f"{path}: {_several(path, content, text, start)}")
    if not isinstance(content, kind):
        got = _JSON_NAMES[type(content)]
        where = _list_in(path, content) if kind is list and isinstance(content, dict) else ""
        raise DataError(f"{path}: expected a JSON {_JSON_NAMES[kind]}, got {got}{where}")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of two values under one key Python would take the last without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in {str(found)[:60]}...")
    return found


def _text(path: Path) -> str:
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror}") from None
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
