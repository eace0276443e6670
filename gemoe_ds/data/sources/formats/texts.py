"""FineVision's and the_cauldron's rows: `images`, and turns of `user` and `assistant`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from gemoe_ds.data.sources.formats import checks
from gemoe_ds.data.sources.formats.base import Columns, Draft, RowFormat, pictures_of
from gemoe_ds.data.sources.formats.chat import conversation
from gemoe_ds.data.sources.lost_keys import loss_of, refuse_lost, unread
from gemoe_ds.data.sources.unusable import Unusable, short
from gemoe_ds.data.turn import MARK, Role

_TURN = ("user", "assistant")


class Texts(RowFormat):
    """Pictures that no text has a marker for stand before the first question, as in both sets."""

    name: ClassVar[str] = "texts"
    title: ClassVar[str] = "texts of user and assistant (FineVision, the_cauldron)"

    @classmethod
    def accepts(cls, row: Mapping[str, Any], columns: Columns) -> bool:
        turns = row.get("texts")
        return isinstance(turns, list) and bool(turns) and all(map(_is_turn, turns))

    @classmethod
    def read(cls, row: Mapping[str, Any], columns: Columns, kinds: Any) -> Draft:
        turns = row.get("texts")
        if not isinstance(turns, list) or not turns or not all(map(_is_turn, turns)):
            said = f"its 'texts' are {short(turns)}, not a list of {{user, assistant}}"
            raise Unusable("no texts", said)
        read = {"texts", *columns.around}
        pictures = pictures_of(row, columns)
        refuse_lost(row, read, has_pictures=bool(pictures))
        roles: list[Role] = ["user", "assistant"] * len(turns)
        texts = [
            checks.checked_text(f"{role!r} of turn {number}", turn[role])
            for number, turn in enumerate(turns)
            for role in _TURN
        ]
        if pictures and not any(MARK in text for text in texts):
            texts[0] = f"{MARK * len(pictures)}\n{texts[0]}"
        is_learned = []
        for number, turn in enumerate(turns):
            is_learned += [False, loss_of(f"turn {number}", turn, _TURN, is_answer=True)]
        spoken = conversation(roles, texts, is_learned, pictures, kinds)
        of_turns = dict.fromkeys(key for turn in turns for key in unread(turn, _TURN))
        notes = [f"the key {key!r} is ignored" for key in unread(row, read)]
        notes += [f"the key {key!r} of a turn is ignored" for key in of_turns]
        return Draft(spoken, tuple(pictures), tuple(notes))


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and all(role in turn for role in _TURN)
