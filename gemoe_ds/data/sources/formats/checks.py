"""Rules of a conversation, whatever format it came in: speakers in turn, markers and pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from gemoe_ds.data.sources.unusable import Unusable, cut, short
from gemoe_ds.data.turn import MARK

# What stands for a picture, video, sound or place in the questions of other formats.
_OTHER_MARKER = re.compile(
    r"<\s*(?:video|audio|image|img|im_start|im_end|im_patch|ImageHere|image-placeholder"
    r"|bbox|ref-object)\s*>"
    r"|<\|(?:vision_|image|video|audio)\w*\|>|<image[ _-]?\d+>",
    re.I,
)


def checked_text(where: str, value: Any) -> str:
    """The text as it is; Unusable if it is none."""
    if value is None:
        raise Unusable("no text", f"{where} has no text")
    if not isinstance(value, str):
        raise Unusable("no text", f"{where} is {short(value)}, not a text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # half a surrogate pair
            raise Unusable("not Unicode", f"{where} is not valid Unicode") from None
    return value


def check_order(roles: Sequence[str], called: Sequence[str]) -> None:
    """Question and answer in turn, behind a system prompt or none; `called`: as the row has it."""
    spoken = [role for role in roles if role != "system"]
    if spoken == ["user", "assistant"] * (len(spoken) // 2) and spoken:
        return
    if spoken[:1] == ["assistant"]:
        first = roles.index("assistant")
        raise Unusable(
            "gpt speaks first",
            f"message {first} is from {called[first]!r}, before any question, and messages are "
            f"question and answer pairs; remove what {called[first]} says before them",
        )
    raise Unusable(
        "not pairs",
        "it is not a list of question and answer pairs: it is from "
        + (cut(", ".join(called)) or "nobody"),
    )


def check_markers(roles: Sequence[str], texts: Sequence[str], num_pictures: int) -> None:
    """As many `<image>` as pictures, all in questions; no marker of another kind in a question."""
    found = [i for i, text in enumerate(texts) if MARK in text for _ in range(text.count(MARK))]
    if len(found) != num_pictures:
        group = "marker without a picture" if len(found) > num_pictures else _fewer(found)
        where = f"in messages {cut(', '.join(map(str, found)))}" if found else "nowhere"
        way_out = "where a text means the characters, write < image >"
        if len(found) < num_pictures:
            way_out = f"write {MARK} in the question, where each stands"
        raise Unusable(
            group,
            f"it has {num_pictures} pictures, and {len(found)} times {MARK}: {where}; {way_out}",
        )
    for index in found:
        if roles[index] != "user" and num_pictures:
            raise Unusable(
                "marker in an answer" if roles[index] == "assistant" else "picture elsewhere",
                f"message {index}, from the {roles[index]}, holds {MARK}; pictures stand in "
                "questions only",
            )
    for index, (role, text) in enumerate(zip(roles, texts, strict=True)):
        if role == "user" and (other := _OTHER_MARKER.search(text.replace(MARK, ""))):
            raise Unusable("other markers", f"message {index} holds the marker {other[0]}")


def _fewer(found: Sequence[int]) -> str:
    return "pictures without markers" if found else "picture without a marker"


def checked_kinds(kinds: Any, number: int) -> list[str | None]:
    """A kind for each of `number` questions, or none."""
    if kinds is None:
        return [None] * number
    if not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise Unusable("kinds", "its kinds are not a list of names")
    if len(kinds) != number:
        raise Unusable("kinds", f"{len(kinds)} kinds for {number} questions")
    return list(kinds)
