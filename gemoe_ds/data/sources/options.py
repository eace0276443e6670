"""Options that only some stores or formats use: one that would be ignored is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemoe_ds.data.sources.formats import RowFormat
from gemoe_ds.data.sources.stores import Store
from gemoe_ds.errors import DataError

Reader = Store | type[RowFormat]


def refuse_unused(
    given: Mapping[str, Any], chosen: Reader, known: Sequence[type[Store | RowFormat]]
) -> None:
    """DataError for an option of the family `known` that the chosen one of it does not use."""
    for option, value in given.items():
        users = [one.title for one in known if option in one.options]
        if users and option not in chosen.options:
            raise DataError(
                f"{option} {value}: it is for {' or '.join(users)}, and this is {chosen.title}; "
                f"remove {option}"
            )
