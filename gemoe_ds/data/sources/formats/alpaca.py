"""A question and its answer under two keys: alpaca's rows, and those of many other sets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from gemoe_ds.data.sources.formats import checks
from gemoe_ds.data.sources.formats.base import Columns, Draft, RowFormat, pictures_of
from gemoe_ds.data.sources.formats.chat import conversation
from gemoe_ds.data.sources.lost_keys import refuse_lost, unread
from gemoe_ds.data.sources.unusable import Unusable, is_empty, short
from gemoe_ds.data.turn import MARK, Role

# Alpaca, ms-swift, Dolly, TRL, OpenOrca, tables of questions.
_PAIRS = (
    ("instruction", "output"),
    ("query", "response"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "response"),
    ("question", "answer"),
)
_ALONE = _PAIRS[2:]  # beside a conversation these are keys of it
_CHATS = ("messages", "conversations", "conversation", "texts")
_MORE = ("input", "context")  # what a question is about
_CHOICES = ("choices", "options")
_SYSTEM = re.compile("system([_ ]?(prompt|message))?", re.I)


class Alpaca(RowFormat):
    """The texts as they are, without the sentences that Stanford's prompt puts around them."""

    name: ClassVar[str] = "alpaca"
    title: ClassVar[str] = "instructions (alpaca: instruction, input, output)"

    @classmethod
    def accepts(cls, row: Mapping[str, Any], columns: Columns) -> bool:
        pair = _pair_of(row)
        return pair is not None and not (pair in _ALONE and any(map(row.get, _CHATS)))

    @classmethod
    def read(cls, row: Mapping[str, Any], columns: Columns, kinds: Any) -> Draft:
        pair = _pair_of(row)
        if pair is None:
            raise Unusable("no alpaca", "it has no 'instruction' and 'output'")
        systems = [key for key, value in row.items() if value and _SYSTEM.fullmatch(key)][:1]
        more = [key for key in _MORE if not is_empty(row.get(key))][:1]
        read = {*pair, *more, "history", *systems, *columns.around}
        pictures = pictures_of(row, columns)
        refuse_lost(row, read, has_pictures=bool(pictures))
        _refuse_others(row, pair, read)
        roles: list[Role] = ["system"] * len(systems)
        texts = [checks.checked_text(f"{key!r}", row[key]) for key in systems]
        for question, answer in _earlier(row.get("history")):
            roles += ["user", "assistant"]
            texts += [
                checks.checked_text("a question of 'history'", question),
                checks.checked_text("an answer of 'history'", answer),
            ]
        asked = [checks.checked_text(f"{key!r}", row[key]) for key in (pair[0], *more)]
        roles += ["user", "assistant"]
        texts.append("\n".join(filter(str.strip, asked)))
        texts.append(checks.checked_text(f"{pair[1]!r}", row[pair[1]]))
        if pair[0] == "question" and len(pictures) == 1 and not any(MARK in t for t in texts):
            texts[-2] = f"{MARK}\n{texts[-2]}"  # tables of questions have no markers
        is_learned = [role == "assistant" for role in roles]
        spoken = conversation(roles, texts, is_learned, pictures, kinds)
        notes = tuple(f"the key {key!r} is ignored" for key in unread(row, read))
        return Draft(spoken, tuple(pictures), notes)


def _pair_of(row: Mapping[str, Any]) -> tuple[str, str] | None:
    return next((pair for pair in _PAIRS if pair[0] in row and pair[1] in row), None)


def _refuse_others(row: Mapping[str, Any], pair: tuple[str, str], read: set[str]) -> None:
    """Unusable for what belongs to the question and stands under another key, or as messages."""
    if any(isinstance(row[key], list) for key in pair):
        raise Unusable(
            "messages under two keys",
            f"its {pair[0]!r} or {pair[1]!r} is a list; write both as one list under 'messages'",
        )
    for key in (*_MORE, *_CHOICES):
        if key not in read and not is_empty(row.get(key)):
            raise Unusable(
                "more of a question",
                f"it has {key!r}: {short(row[key])}; write it into {pair[0]!r}",
            )


def _earlier(history: Any) -> list[tuple[Any, Any]]:
    if is_empty(history):
        return []
    pairs = history if isinstance(history, list) else [history]
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise Unusable(
            "earlier turns", f"its 'history' is {short(history)}, not a list of [question, answer]"
        )
    return [(pair[0], pair[1]) for pair in pairs]
