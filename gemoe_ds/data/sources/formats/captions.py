"""A picture and its caption, which `--question` asks for: img2dataset's and other pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from gemoe_ds.data.sources.formats import checks
from gemoe_ds.data.sources.formats.base import Columns, Draft, RowFormat, pictures_of
from gemoe_ds.data.sources.formats.chat import conversation
from gemoe_ds.data.sources.lost_keys import elsewhere, picture_key, refuse_lost, unread
from gemoe_ds.data.sources.unusable import Unusable, is_empty
from gemoe_ds.data.turn import MARK

_CAPTIONS = ("txt", "caption", "text")


class Captions(RowFormat):
    """One picture with `txt`, `caption`, `text`, or the text column if one is named; the question
    is the user's."""

    name: ClassVar[str] = "captions"
    title: ClassVar[str] = "pictures and captions"
    rank: ClassVar[int] = -2
    options: ClassVar[frozenset[str]] = RowFormat.options | {"--text-column", "--question"}

    @classmethod
    def accepts(cls, row: Mapping[str, Any], columns: Columns) -> bool:
        return bool(pictures_of(row, columns)) and cls._key(row, columns) is not None

    @classmethod
    def read(cls, row: Mapping[str, Any], columns: Columns, kinds: Any) -> Draft:
        key, pictures = cls._key(row, columns), pictures_of(row, columns)
        if not pictures and (other := picture_key(row)):
            raise Unusable("picture elsewhere", elsewhere(other))
        if key is None or len(pictures) != 1:
            raise Unusable(
                "not a caption", f"it has {len(pictures)} pictures and a caption under {key!r}"
            )
        if not columns.question:
            raise Unusable(
                "captions without a question",
                "it is a picture with a caption; give the question that the caption answers, for "
                "example --question 'Describe the picture.'",
            )
        read = {key, *columns.around}
        refuse_lost(row, read, has_pictures=True)
        texts = [f"{MARK}\n{columns.question}", checks.checked_text(f"{key!r}", row[key])]
        spoken = conversation(["user", "assistant"], texts, [False, True], pictures, kinds)
        notes = tuple(f"the key {name!r} is ignored" for name in unread(row, read))
        return Draft(spoken, tuple(pictures), notes)

    @staticmethod
    def _key(row: Mapping[str, Any], columns: Columns) -> str | None:
        names = _CAPTIONS if columns.text == Columns.text else (columns.text,)
        return next((name for name in names if not is_empty(row.get(name))), None)
