"""One row of a LLaVA-format JSON -> its turns and its picture, or the reason why it cannot be used.

A row that holds what is not supported (video, tools, a system prompt, several pictures, turns that
are not to be learned ...) is refused by name. What else stands in it is told by `notes`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemoe_ds.data.images import has_more_frames, read_image
from gemoe_ds.data.sample import Sample, Turn
from gemoe_ds.errors import ImageError

MARKER = "<image>"
SPEAKERS = ("human", "gpt")
TOOL_SPEAKERS = re.compile(r"(tool|function|observation|ipython|environment)", re.I)

# Keys whose content would be lost, in a row or in one of its messages; what to call it. A key is
# compared by its small letters and digits: `video_path`, `videoPath`.
_FILE = "((path|file|filename|name|url|byte|base64|list)s?)?"
_NOT_SUPPORTED = {
    name: re.compile(keys)
    for name, keys in {
        "video": f"(video|clip)s?{_FILE}|(video)?frames{_FILE}",
        "audio": f"(audio|sound|wav|speech)s?{_FILE}",
        "a list of pictures": rf"images((file|path)s?)?|imagelist|(image|img|picture)\d+{_FILE}",
        "a system prompt": "system(prompt|message)?",
        "tools": "tools?|functions?|functioncall|toolcalls?|toolcallid",
        "a preference": "(chosen|rejected).*|ktotag|(positive|negative)messages",
        "earlier turns": "history",
        "reasoning": "reasoning(content)?|thinking|thoughts?",
        "a mask of the loss": "lossmask|train(ing)?detail",
        "a second conversation": "messages",
    }.items()
}
_NOT_SUPPORTED_IN_MESSAGES = _NOT_SUPPORTED | {
    "a picture of its own": re.compile(f"(image|img|picture){_FILE}"),
    "a second text": re.compile("content"),
}
# Every answer counts once. What says otherwise is not heeded, so it is refused.
_COUNTS = re.compile(
    "((sample|row|turn|message)?weight"
    "|(compute|do|is)?(loss|train|training|trainable|learn)(weight|scale)?)"
)
_LEFT_OUT = re.compile("(is)?((no|not)(loss|train|training)|(mask|ignore|skip)(d|ed|ped)?)")
_READ = {"id", "image", "conversations"}
_READ_IN_MESSAGES = {"from", "value"}
# Where else a row may name its picture, if it has no `image`; beside one they are metadata.
_PICTURE = re.compile(f"(image|img|picture)s?{_FILE}")
# What stands for a picture, video or sound in the questions of other formats.
_OTHER_MARKER = re.compile(
    r"<\s*(?:video|audio|image|img|im_start|im_end|im_patch|ImageHere|image-placeholder)\s*>"
    r"|<\|(?:vision_|image|video|audio)\w*\|>|<image[ _-]?\d+>",
    re.I,
)


class Unusable(Exception):
    """Why a row is dropped: `reason` of this row, `group` of all that are dropped for the like."""

    def __init__(self, group: str, reason: str) -> None:
        super().__init__(reason)
        self.group = group


def read_turns(row: Any, kinds: Any) -> tuple[Turn, ...]:
    """The questions and answers, without the image marker; Unusable says why not."""
    messages = _messages(row)
    texts = [_text(index, message) for index, message in enumerate(messages)]
    _check_markers(texts, has_image=row.get("image") is not None)
    texts[0] = texts[0].replace(MARKER, "").strip()
    for index, text in enumerate(texts[::2]):
        if other := _OTHER_MARKER.search(text):
            raise Unusable("other markers", f"question {index} holds the marker {other[0]}")
    if not all(texts[1::2]):
        raise Unusable("empty answer", "an answer is empty")
    names = _kinds(kinds, len(texts) // 2)
    return tuple(
        Turn(human, gpt, kind)
        for human, gpt, kind in zip(texts[::2], texts[1::2], names, strict=True)
    )


def read_picture(row: dict[str, Any], images: Path, min_size: int) -> bytes | None:
    """The encoded bytes of a picture that can be decoded, None if there is none."""
    name = row.get("image")
    if name is None:
        return None
    if not isinstance(name, str) or not name.strip():
        what = "several pictures" if isinstance(name, list) else "not a file name"
        raise Unusable(what, f"image is {_short(name)}, not one file name")
    if name.startswith("data:") or len(name) > 1000:
        raise Unusable("not a file name", f"image is data ({_short(name)}), not a file name")
    if "://" in name:
        raise Unusable("not a file name", f"image is a URL ({_short(name)}), not a file name")
    try:
        encoded = (images / name).read_bytes()
    except OSError as error:
        raise Unusable("picture missing", f"image {name}: {error.strerror}") from None
    except ValueError as error:  # a NUL in the name
        raise Unusable("picture missing", f"image {name!r}: {error}") from None
    try:
        width, height = read_image(encoded).size
    except ImageError as error:
        raise Unusable("picture broken", f"image {name} cannot be decoded: {error}") from None
    if min(width, height) < min_size:
        raise Unusable(
            "picture too small", f"image {name} is {width}x{height}, smaller than {min_size}"
        )
    return encoded


def notes(row: dict[str, Any], sample: Sample) -> Iterator[str]:
    """What is worth saying of a row that is used: keys that are not read, what was changed."""
    for key in _unread(row, _READ):
        yield f"the key {key!r} is ignored"
    messages = row["conversations"]
    for key in dict.fromkeys(key for m in messages for key in _unread(m, _READ_IN_MESSAGES)):
        yield f"the key {key!r} of a message is ignored"
    if sample.images:
        asked = messages[0]["value"].strip()
        if not (asked.startswith(MARKER) or asked.endswith(MARKER)):
            yield f"{MARKER} stood inside the question; the picture stands before it"
        if has_more_frames(sample.images[0].data):
            yield "an animation or several pages, of which the first is read"


def _unread(holder: dict[str, Any], read: set[str]) -> Iterator[str]:
    for key, value in holder.items():
        if key in read or _is_empty(value):
            continue
        if not (_COUNTS.fullmatch(letters := _letters(key)) or _LEFT_OUT.fullmatch(letters)):
            yield _cut(key)


def _messages(row: Any) -> list[dict[str, Any]]:
    """Question and answer in turn, each with its text under `value`."""
    if not isinstance(row, dict):
        raise Unusable("not an object", f"the row is {_short(row)}, not an object")
    messages = row.get("conversations")
    if messages is None:
        raise Unusable(*_other_format(row))
    if not isinstance(messages, list):
        raise Unusable("not conversations", f"conversations is {_short(messages)}, not a list")
    for index, message in enumerate(messages):
        _check_speaker(index, message)
    _refuse_lost(row, messages)
    _check_order([message["from"] for message in messages])
    return messages


def _check_order(speakers: list[str]) -> None:
    if speakers == [*SPEAKERS] * (len(speakers) // 2) and speakers:
        return
    if speakers[:1] == ["gpt"]:
        raise Unusable(
            "gpt speaks first",
            "message 0 is from 'gpt', not from 'human', and messages are question and answer "
            "pairs; remove what gpt says before the first question",
        )
    raise Unusable(
        "not pairs",
        "conversations is not a list of question and answer pairs: it is from "
        + (_cut(", ".join(speakers)) or "nobody"),
    )


def _other_format(row: dict[str, Any]) -> tuple[str, str]:
    way_out = "write it as 'conversations': [{from: human, value}, {from: gpt, value}]"
    if "messages" in row:
        return "messages", f"it has 'messages' (role, content), not 'conversations'; {way_out}"
    if "instruction" in row and "output" in row:
        return "alpaca", f"it has 'instruction' and 'output' (alpaca); {way_out}"
    keys = _cut(", ".join(row)) if row else "none"
    return "no conversations", f"it has no 'conversations' (its keys: {keys}); {way_out}"


def _check_speaker(index: int, message: Any) -> None:
    if not isinstance(message, dict):
        raise Unusable("not conversations", f"message {index} is {_short(message)}, not an object")
    speaker = message.get("from")
    if speaker in SPEAKERS:
        return
    if speaker is None and "role" in message:
        raise Unusable(
            "messages",
            f"message {index} has 'role' and 'content'; write them as 'from' (human or gpt) and "
            "'value'",
        )
    if str(speaker).lower() == "system":
        raise Unusable(
            "a system prompt",
            f"message {index} is from {speaker!r}, a system prompt, which is not supported; "
            "remove it, or write it into the question",
        )
    if TOOL_SPEAKERS.match(str(speaker)):
        raise Unusable(
            "tools", f"message {index} is from {speaker!r}; calls of tools are not supported"
        )
    raise Unusable(
        "other speakers",
        f"message {index} is from {_short(speaker)}, not from {SPEAKERS[index % 2]!r}; the "
        "speakers are called human and gpt",
    )


def _refuse_lost(row: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    """Keys that are not read must be such as lose nothing."""
    for key, value in row.items():
        if key not in _READ:
            _check_key("it", key, value, _NOT_SUPPORTED)
            if (
                _PICTURE.fullmatch(_letters(key))
                and row.get("image") is None
                and not _is_empty(value)
            ):
                raise Unusable(
                    "picture elsewhere", f"its picture is under {key!r}, not under 'image'"
                )
    for index, message in enumerate(messages):
        if message.keys() == _READ_IN_MESSAGES:
            continue
        for key, value in message.items():
            if key not in _READ_IN_MESSAGES:
                _check_key(
                    f"message {index}",
                    key,
                    value,
                    _NOT_SUPPORTED_IN_MESSAGES,
                    is_question=message["from"] == SPEAKERS[0],
                )


def _check_key(
    where: str,
    key: str,
    value: Any,
    not_supported: dict[str, re.Pattern[str]],
    *,
    is_question: bool = False,
) -> None:
    """Refuse a key whose content would be lost, or that says how much an answer counts."""
    name = _letters(key)
    if _COUNTS.fullmatch(name) and value is not None:
        # Elsewhere `train: true` makes a question be learned; its weight alone never does.
        counts = "weight" in name or not value if is_question else value == 1
    else:
        counts = is_question or not (_LEFT_OUT.fullmatch(name) and value)
    if not counts:
        rule = "no question is learned" if is_question else "every answer counts once"
        raise Unusable("weights of the loss", f"{where} has {key!r}: {_short(value)}; {rule}")
    if _is_empty(value):
        return
    lost = [what for what, keys in not_supported.items() if keys.fullmatch(name)]
    if name == "label" and isinstance(value, bool):
        lost = ["a preference"]
    if lost:
        raise Unusable(
            lost[0],
            f"{where} has {key!r}, and {lost[0]} cannot be used yet (without the key the row can)",
        )


@functools.cache
def _letters(key: str) -> str:
    return re.sub(r"[\W_]", "", key.lower())


def _is_empty(value: Any) -> bool:
    return value is None or value == "" or value == [] or value == {}


def _text(index: int, message: dict[str, Any]) -> str:
    value = message.get("value")
    if value is None:
        raise Unusable("no text", f"message {index} has no text")
    if isinstance(value, list):
        raise Unusable(
            "parts", f"message {index} is a list of parts ({_short(value)}); write it as one text"
        )
    if not isinstance(value, str):
        raise Unusable("no text", f"message {index} is {_short(value)}, not a text")
    if value != printable(value):  # half a surrogate pair
        raise Unusable("not Unicode", f"message {index} is not valid Unicode")
    return value.strip()


def _check_markers(texts: list[str], *, has_image: bool) -> None:
    found = [i for i, text in enumerate(texts) for _ in range(text.count(MARKER))]
    if found == [0] * has_image:
        return
    if len(found) > has_image:
        group = "several pictures" if has_image else "marker without a picture"
    else:
        group = "picture in a later turn" if found else "picture without a marker"
    where = f"found it in messages {_cut(', '.join(map(str, found)))}" if found else "found none"
    raise Unusable(group, f"expected {int(has_image)} {MARKER} in the first question, {where}")


def _kinds(kinds: Any, number: int) -> list[str | None]:
    if kinds is None:
        return [None] * number
    if not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise Unusable("kinds", "its kinds are not a list of names")
    if len(kinds) != number:
        raise Unusable("kinds", f"{len(kinds)} kinds for {number} questions")
    return list(kinds)


def printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _short(value: Any) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."
