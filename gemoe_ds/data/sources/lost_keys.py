"""Keys of a row whose content would be lost: they are refused by name, other unread ones told."""

from __future__ import annotations

import functools
import re
from collections.abc import Container, Iterator, Mapping
from typing import Any

from gemoe_ds.data.sources.picture_names import is_picture
from gemoe_ds.data.sources.unusable import Unusable, cut, is_empty, short

# Keys whose content would be lost, in a row or in one of its messages; what to call it. A key is
# compared by its small letters and digits: `video_path`, `videoPath`.
_FILE = "((path|file|filename|name|url|byte|base64|list)s?)?"
_NOT_SUPPORTED = {
    name: re.compile(keys)
    for name, keys in {
        "video": f"(video|clip)s?{_FILE}|(video)?frames{_FILE}",
        "audio": f"(audio|sound|wav|speech)s?{_FILE}",
        "a second list of pictures": (
            rf"images((file|path)s?)?|imagelist|(image|img|picture)\d+{_FILE}"
        ),
        "a second system prompt": "system(prompt|message)?",
        "tools": "tools?|functions?|functioncall|toolcalls?|toolcallid",
        "a preference": "(chosen|rejected).*|ktotag|(positive|negative)messages",
        "earlier turns": "history",
        "reasoning": "reasoning(content)?|thinking|thoughts?",
        "a mask of the loss": "lossmask|train(ing)?detail",
        "a second conversation": "messages|conversations?",
    }.items()
}
_NOT_SUPPORTED_IN_MESSAGES = _NOT_SUPPORTED | {
    "a picture of its own": re.compile(f"(image|img|picture)s?{_FILE}"),
    "a second text": re.compile("content|value"),
}
# Where else a row may name its picture; beside one that is read they are metadata.
_PICTURE = re.compile(f"(image|img|picture)s?{_FILE}")
_NOTHING = ("[]", "{}", "null")  # as JSON in a text
_COUNTS = re.compile(
    "((sample|row|turn|message)?weight"
    "|(compute|do|is)?(loss|train|training|trainable|learn)(weight|scale)?)"
)
_LEFT_OUT = re.compile("(is)?((no|not)(loss|train|training)|(mask|ignore|skip)(d|ed|ped)?)")


def refuse_lost(row: Mapping[str, Any], read: Container[str], *, has_pictures: bool) -> None:
    """Unusable for a key that is not in `read` and whose content would be lost with it.

    `has_pictures`: whether pictures of the row were found; then other keys that name one say where
    these are from.
    """
    for key, value in row.items():
        if key in read or is_empty(value) or value in _NOTHING:
            continue
        if _is_of_loss(key) and not _is_one(key, value):
            raise Unusable(
                "weights of the loss",
                f"it has {key!r}: {short(value)}; every row counts once (answers may be left out "
                "of the loss one by one)",
            )
        lost = _lost(key, value, _NOT_SUPPORTED)
        if not lost and not has_pictures and _is_of_picture(key, value):
            raise Unusable("picture elsewhere", elsewhere(key))
        if lost:
            raise _unsupported("it", key, lost)


def picture_key(row: Mapping[str, Any]) -> str | None:
    """The first key that names or holds a picture, whatever the row is read as."""
    found = (key for key, value in row.items() if not is_empty(value))
    return next((key for key in found if _is_of_picture(key, row[key])), None)


def elsewhere(key: str) -> str:
    """That the key has a row's picture, and how it is read."""
    return (
        f"its picture is under {key!r}, not under 'image' or 'images'; --image-column {key} reads "
        "it, and without the key the row has none"
    )


def _is_of_picture(key: str, value: Any) -> bool:
    return bool(_PICTURE.fullmatch(_letters(key))) or is_picture(value)


def loss_of(
    where: str, message: Mapping[str, Any], read: Container[str], *, is_answer: bool
) -> bool:
    """Whether a message is learned; Unusable for a key whose content would be lost.

    An answer is, unless one of its keys says otherwise: `weight: 0`, `loss: false`, `masked: true`.
    """
    is_learned = is_answer
    for key, value in message.items():
        if key in read:
            continue
        if _is_of_loss(key) and value is not None:
            if not is_answer:
                _check_question(where, key, value)
            elif not _is_one(key, value):
                if not _is_none(key, value):
                    raise Unusable(
                        "weights of the loss",
                        f"{where} has {key!r}: {short(value)}; an answer counts once or not at all",
                    )
                is_learned = False
        elif not is_empty(value) and (lost := _lost(key, value, _NOT_SUPPORTED_IN_MESSAGES)):
            raise _unsupported(where, key, lost)
    return is_learned


def unread(holder: Mapping[str, Any], read: Container[str]) -> Iterator[str]:
    """Keys with a content that is not read and not missed."""
    for key, value in holder.items():
        if key not in read and not is_empty(value) and not _is_of_loss(key):
            yield cut(key)


def _unsupported(where: str, key: str, lost: str) -> Unusable:
    way_out = "without the key the row can"
    return Unusable(lost, f"{where} has {key!r}, and {lost} cannot be used yet ({way_out})")


def _lost(key: str, value: Any, not_supported: Mapping[str, re.Pattern[str]]) -> str | None:
    name = _letters(key)
    if name == "label" and isinstance(value, bool):
        return "a preference"
    return next((what for what, keys in not_supported.items() if keys.fullmatch(name)), None)


def _is_of_loss(key: str) -> bool:
    name = _letters(key)
    return bool(_COUNTS.fullmatch(name) or _LEFT_OUT.fullmatch(name))


def _is_one(key: str, value: Any) -> bool:
    """Whether a key of the loss says that it counts once."""
    return not value if _LEFT_OUT.fullmatch(_letters(key)) else bool(value is None or value == 1)


def _is_none(key: str, value: Any) -> bool:
    """Whether it says that it does not count."""
    said = value is True or value == 1
    return said if _LEFT_OUT.fullmatch(_letters(key)) else bool(value is False or value == 0)


def _check_question(where: str, key: str, value: Any) -> None:
    """`train: true` makes a question be learned elsewhere; its weight alone never does."""
    name = _letters(key)
    if _COUNTS.fullmatch(name) and "weight" not in name and value:
        raise Unusable(
            "weights of the loss", f"{where} has {key!r}: {short(value)}; no question is learned"
        )


@functools.cache
def _letters(key: str) -> str:
    return re.sub(r"[\W_]", "", key.lower())
