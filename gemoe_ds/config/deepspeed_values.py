"""Values of a DeepSpeed file as the types that DeepSpeed wants; ValueError says what is right.

Numbers may stand in quotes, and whole ones may be written as 5e8.
"""

from __future__ import annotations

import math
import sys
from typing import Any


def flag(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise ValueError("true or false")


def choice(choices: list[str], value: Any) -> Any:
    if choices[0].isdecimal():
        given = float(value) if is_number(value) else math.nan
        if given not in [float(known) for known in choices]:
            raise ValueError(f"one of {', '.join(choices)}")
        return int(given)
    if value not in choices:
        raise ValueError(f"one of {', '.join(choices)}")
    return value


def number(kind: str, value: Any) -> int | float:
    """A number, which may stand in quotes or, if it is a whole one, be written as 5e8."""
    lowest = {"size": 1, "even": 2, "whole": -sys.maxsize}.get(kind, 0)
    highest = {"share": 1.0, "number": math.inf}.get(kind, sys.maxsize)
    is_whole = kind in ("size", "even", "count", "whole")
    word = f"{'an even' if kind == 'even' else 'a whole'} number" if is_whole else "a number"
    limits = {
        "size": ", 1 or more",
        "even": ", 2 or more",
        "share": " from 0 to 1",
        "whole": "",
    }.get(kind, ", 0 or more")
    given = float(value) if is_number(value) else math.nan
    if not math.isfinite(given) or not lowest <= given <= highest:
        raise ValueError(word + limits)
    if not is_whole:
        return given
    if given % (2 if kind == "even" else 1):
        raise ValueError(word + limits)
    return value if isinstance(value, int) else int(given)


def is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    try:
        float(value)
    except (ValueError, OverflowError):
        return False
    return True
