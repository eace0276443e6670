"""Alpaca: `instruction`, `input`, `output`, `system`, `history`; ms-swift's query and response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from gemoe_ds.data.sources.formats import checks
from gemoe_ds.data.sources.formats.base import Columns, Draft, RowFormat, pictures_of
from gemoe_ds.data.sources.formats.chat import conversation
from gemoe_ds.data.sources.lost_keys import refuse_lost, unread
from gemoe_ds.data.sources.unusable import Unusable, is_empty, short
from gemoe_ds.data.turn import Role

_PAIRS = (("instruction", "output"), ("query", "response"))


class Alpaca(RowFormat):
    """The texts as they are, without the sentences that Stanford's prompt puts around them."""

    name: ClassVar[str] = "alpaca"
    title: ClassVar[str] = "instructions (alpaca: instruction, input, output)"

    @classmethod
    def accepts(cls, row: Mapping[str, Any], columns: Columns) -> bool:
        return any(asked in row and answer in row for asked, answer in _PAIRS)

    @classmethod
    def read(cls, row: Mapping[str, Any], columns: Columns, kinds: Any) -> Draft:
        pair = next((pair for pair in _PAIRS if pair[0] in row and pair[1] in row), None)
        if pair is None:
            raise Unusable("no alpaca", "it has no 'instruction' and 'output'")
        read = {*pair, "input", "system", "history", *columns.around}
        pictures = pictures_of(row, columns)
        refuse_lost(row, read, has_pictures=bool(pictures))
        roles: list[Role] = []
        texts: list[str] = []
        if not is_empty(row.get("system")):
            roles, texts = ["system"], [checks.checked_text("'system'", row["system"])]
        for question, answer in _earlier(row.get("history")):
            roles += ["user", "assistant"]
            texts += [
                checks.checked_text("a question of 'history'", question),
                checks.checked_text("an answer of 'history'", answer),
            ]
        asked = [checks.checked_text(f"'{pair[0]}'", row[pair[0]])]
        if not is_empty(row.get("input")):
            asked.append(checks.checked_text("'input'", row["input"]))
        roles += ["user", "assistant"]
        texts += [
            "\n".join(filter(str.strip, asked)),
            checks.checked_text(f"'{pair[1]}'", row[pair[1]]),
        ]
        is_learned = [role == "assistant" for role in roles]
        spoken = conversation(roles, texts, is_learned, pictures, kinds)
        notes = tuple(f"the key {key!r} is ignored" for key in unread(row, read))
        return Draft(spoken, tuple(pictures), notes)


def _earlier(history: Any) -> list[tuple[Any, Any]]:
    if is_empty(history):
        return []
    pairs = history if isinstance(history, list) else [history]
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise Unusable(
            "earlier turns", f"its 'history' is {short(history)}, not a list of [question, answer]"
        )
    return [(pair[0], pair[1]) for pair in pairs]
