"""Why a row is dropped, and how a value of it is quoted."""

from __future__ import annotations

from typing import Any

_SHOWN = 60  # characters of a value
_SIZED = (str, bytes, list, tuple, dict)


class Unusable(Exception):
    """Why a row is dropped: `reason` of this row, `group` of all that are dropped for the like."""

    def __init__(self, group: str, reason: str) -> None:
        super().__init__(reason)
        self.group = group


def printable(text: str) -> str:
    """The same with halves of surrogate pairs written out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def short(value: Any) -> str:
    return cut(repr(value))


def cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def is_empty(value: Any) -> bool:
    """Nothing, a text or list without content, or NaN, which pandas writes for nothing."""
    is_nan = isinstance(value, float) and value != value
    return value is None or is_nan or (not value and isinstance(value, _SIZED))
