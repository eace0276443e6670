"""A list of messages in the ways that tables keep it: as one, as JSON, as a list for each key."""

from __future__ import annotations

import json
from typing import Any

from gemoe_ds.data.sources.json_file import no_key_twice
from gemoe_ds.data.sources.unusable import Unusable, short


def as_list(key: str, stored: Any) -> list[Any]:
    """The messages under a row's `key`; Unusable if they are no list in any of these ways."""
    found = _of_json(stored) if isinstance(stored, str) else stored
    if isinstance(found, dict):
        found = _of_lists(found)
    if not isinstance(found, list):
        raise Unusable("not conversations", f"{key} is {short(stored)}, not a list")
    return found


def _of_json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=no_key_twice)
    except (ValueError, RecursionError):
        return None


def _of_lists(lists: dict[str, Any]) -> list[dict[str, Any]] | None:
    """`datasets` keeps a sequence of objects as {"from": [...], "value": [...]}."""
    values = list(lists.values())
    if not values or not all(isinstance(value, list) for value in values):
        return None
    if len({len(value) for value in values}) != 1:
        return None
    return [dict(zip(lists, items, strict=True)) for items in zip(*values, strict=True)]
