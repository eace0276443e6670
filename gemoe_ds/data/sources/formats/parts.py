"""A message whose content is a list of parts, text and pictures: as one text with markers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gemoe_ds.data.sources.lost_keys import loss_of
from gemoe_ds.data.sources.picture_names import is_picture
from gemoe_ds.data.sources.unusable import Unusable, is_empty, short
from gemoe_ds.data.turn import MARK

TEXTS = {"text", "input_text", "output_text"}
PICTURES = {"image", "image_url", "input_image"}
_PLACES = ("image_url", "image", "url", "path", "bytes", "data", "base64", "source")
_CONTENTS = ("bytes", "base64")
READ = {"type", "text", "index", *_PLACES}

_OTHER = re.compile("(video|audio)")


class Listed:
    """The pictures of a row's own list, which parts without a picture of their own stand for."""

    def __init__(self, pictures: list[Any]) -> None:
        self.pictures = pictures
        self._used: set[int] = set()

    def take(self, index: Any) -> Any:
        """The one of that number or, without a number, the first that nobody took; or None."""
        if index is None:
            index = next((n for n in range(len(self.pictures)) if n not in self._used), None)
        if not isinstance(index, int) or not 0 <= index < len(self.pictures):
            return None
        self._used.add(index)
        return self.pictures[index]

    @property
    def left(self) -> list[Any]:
        """Those that no part has taken."""
        return [p for number, p in enumerate(self.pictures) if number not in self._used]


def as_text(where: str, parts: Sequence[Any], listed: Listed) -> tuple[str, list[Any]]:
    """The parts one behind the other, `<image>` for each picture, and these pictures."""
    texts: list[str] = []
    pictures: list[Any] = []
    for part in parts:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, Mapping):
            raise Unusable("parts", f"{where} has the part {short(part)}, which is no object")
        kind = part.get("type")
        if kind in TEXTS:
            text = part.get("text")
            if not isinstance(text, str):
                raise Unusable("parts", f"{where} has a text part without a text: {short(part)}")
            if picture := next((key for key in _PLACES if _has_picture(part, key)), None):
                raise _both(where, picture, part)
            texts.append(text)
        elif kind in PICTURES:
            if not is_empty(part.get("text")):
                raise _both(where, "text", part)
            pictures.append(_picture(where, part, listed))
            texts.append(MARK)
        else:
            name = kind if isinstance(kind, str) and kind else "parts"
            other = _OTHER.search(name)
            raise Unusable(
                other[0] if other else "parts",
                f"{where} has a part of type {short(kind)}; text and image can be used",
            )
        loss_of(where, part, READ, is_answer=False)
    joined = "".join(texts)
    if pictures and joined.count(MARK) > len(pictures):
        raise Unusable("parts", f"{where} has pictures as parts, and {MARK} in its text as well")
    return joined, pictures


def _has_picture(part: Mapping[str, Any], key: str) -> bool:
    """Whether a text has one; `source` and `url` may say where the text is from."""
    value = part.get(key)
    return not is_empty(value) and ("image" in key or key in _CONTENTS or is_picture(value))


def _both(where: str, key: str, part: Mapping[str, Any]) -> Unusable:
    return Unusable(
        "parts",
        f"{where} has a part of type {short(part['type'])} with {key!r} in it; write the text and "
        "the picture as two parts",
    )


def _picture(where: str, part: Mapping[str, Any], listed: Listed) -> Any:
    found = [part[key] for key in _PLACES if not is_empty(part.get(key))]
    if len(found) > 1:
        raise Unusable("parts", f"{where} has a part with two pictures: {short(part)}")
    if found:
        given = found[0]
        if isinstance(given, Mapping):  # {url, detail}, {bytes, path}, {type, media_type, data}
            given = given.get("url") or given.get("data") or given
        return given
    if is_empty(own := listed.take(part.get("index"))):
        raise Unusable(
            "marker without a picture",
            f"{where} has a part for a picture, and the row has none (left) for it",
        )
    return own
