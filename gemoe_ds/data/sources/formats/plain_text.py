"""Plain text: a document a row, learned as a whole, without a chat's template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from gemoe_ds.data.sources.formats import checks
from gemoe_ds.data.sources.formats.base import Columns, Draft, RowFormat, pictures_of
from gemoe_ds.data.sources.lost_keys import picture_key, refuse_lost, unread
from gemoe_ds.data.sources.unusable import Unusable
from gemoe_ds.data.turn import MARK, Message


class PlainText(RowFormat):
    """The column `text`, or the one that `--text-column` names."""

    name: ClassVar[str] = "text"
    title: ClassVar[str] = "plain text"
    rank: ClassVar[int] = -1  # many sets have their chats once more as `text`
    options: ClassVar[frozenset[str]] = frozenset({"--text-column"})

    @classmethod
    def accepts(cls, row: Mapping[str, Any], columns: Columns) -> bool:
        others = {key: value for key, value in row.items() if key != columns.text}
        is_alone = not pictures_of(row, columns) and picture_key(others) is None
        return is_alone and isinstance(row.get(columns.text), str)

    @classmethod
    def read(cls, row: Mapping[str, Any], columns: Columns, kinds: Any) -> Draft:
        text = row.get(columns.text)
        if pictures_of(row, columns):
            raise Unusable("picture without a marker", "it has a picture beside its text")
        if kinds is not None:
            raise Unusable("kinds", "plain text has no questions that kinds could name")
        read = {columns.text, *columns.around}
        refuse_lost(row, read, has_pictures=False)
        if not checks.checked_text(f"{columns.text!r}", text).strip():
            raise Unusable("no text", f"its {columns.text!r} is empty")
        if MARK in str(text):
            raise Unusable(
                "marker without a picture",
                f"its text holds {MARK}, which stands for a picture; write < image > there",
            )
        notes = tuple(f"the key {key!r} is ignored" for key in unread(row, read))
        return Draft((Message("text", str(text), loss=True),), notes=notes)
