"""A format of rows: what a row says as messages, with its pictures still as it names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from gemoe_ds.data.sources.unusable import is_empty
from gemoe_ds.data.turn import Message
from gemoe_ds.registry import Registered


@dataclass(frozen=True)
class Columns:
    """Names of columns that a user gave, and what stands in for one that rows lack."""

    text: str = "text"
    image: str | None = None  # beside `image` and `images`
    source: str | None = None  # the column that names a row's source
    question: str | None = None  # what a caption is asked with
    kinds: Mapping[str, Any] = field(default_factory=dict)  # of questions, by id

    def with_kinds(self, kinds: Mapping[str, Any]) -> Columns:
        return replace(self, kinds=kinds)

    def pictures(self) -> tuple[str, ...]:
        """Keys under which a row names its pictures."""
        return ("image", "images", *([self.image] if self.image else []))

    @property
    def around(self) -> set[str]:
        """Keys that are read of every row, whatever its format."""
        return {"id", "__key__", *self.pictures(), *([self.source] if self.source else [])}


@dataclass(frozen=True)
class Draft:
    """A row that has been read: `pictures` as it names them, in the order of their markers."""

    messages: tuple[Message, ...]
    pictures: tuple[Any, ...] = ()
    notes: tuple[str, ...] = ()  # keys that are not read, what was changed


class RowFormat(Registered):
    """One published format. A subclass sets `name` and `title` and reads a row."""

    title: ClassVar[str]  # what `reads as:` says after "rows of"
    rank: ClassVar[int] = 0  # of two that accept a row, the higher one reads it
    options: ClassVar[frozenset[str]] = frozenset({"--images", "--image-column"})  # that it uses

    @classmethod
    def accepts(cls, row: Mapping[str, Any], columns: Columns) -> bool:
        """Whether a row looks like this format; its content may still be unusable."""
        raise NotImplementedError

    @classmethod
    def read(cls, row: Mapping[str, Any], columns: Columns, kinds: Any) -> Draft:
        """Unusable says why not. `kinds`: of this row's questions, or None."""
        raise NotImplementedError


def pictures_of(row: Mapping[str, Any], columns: Columns) -> list[Any]:
    """What a row names as its pictures, in order, from the one key that names any."""
    named = [row[key] for key in columns.pictures() if not is_empty(row.get(key))]
    if not named:
        return []
    return list(named[0]) if isinstance(named[0], list | tuple) else [named[0]]
