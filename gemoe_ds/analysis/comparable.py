"""Whether trainings differ in their seed alone: only then are they one row of a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from gemoe_ds.errors import DataError


class Trained(Protocol):
    """A record that says how it was trained; {} in those of earlier versions."""

    @property
    def training(self) -> Mapping[str, Any]: ...


def check_seeds(row: str, records: Iterable[tuple[str, Trained]]) -> None:
    """DataError unless all records of a row, by what they are called, were trained alike."""
    (first, known), *others = records
    for name, record in others:
        if other := difference(known.training, record.training):
            raise DataError(
                f"{first} and {name} are both {row}, and their trainings differ in {other}: seeds "
                "of one row differ in nothing else; leave one out, or give it another --name"
            )


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The first option that both have, set otherwise: "optim.lr (0.001, 0.5)"; or ""."""
    for key in one:
        if key in other and one[key] != other[key]:
            return f"{key} ({one[key]}, {other[key]})"
    return ""
