"""A picture as a row names it, a file, bytes, base64 or a data URL -> a checked Picture.

Every picture is decoded here, so that no step of a training run meets a broken one; the encoded
bytes are kept as they are.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from gemoe_ds.data.images import display_size, read_image
from gemoe_ds.data.sources.unusable import Unusable, is_empty, short
from gemoe_ds.data.turn import Picture
from gemoe_ds.errors import ImageError

_LONG = 1000  # characters; a longer name of a file is none
_SHORTEST = 60  # characters of base64 that hold a picture
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+=*\s*")
_KNOWN = {"bytes", "path", "url", "detail", "data", "media_type", "type"}


@dataclass(frozen=True)
class PictureReader:
    """Finds files in the first of `folders` that has them; `min_size`: of the shorter side, in
    pixels."""

    folders: tuple[Path, ...]
    min_size: int = 1

    def beside(self, folder: Path) -> PictureReader:
        """The same, which looks there at last."""
        return self if folder in self.folders else replace(self, folders=(*self.folders, folder))

    def __call__(self, named: Any) -> Picture:
        """Unusable says why there is none."""
        called, encoded = self._encoded(named)
        try:
            width, height = read_image(encoded).size
        except ImageError as error:
            raise Unusable("picture broken", f"{called} cannot be decoded: {error}") from None
        if min(width, height) < self.min_size:
            raise Unusable(
                "picture too small", f"{called} is {width}x{height}, smaller than {self.min_size}"
            )
        return Picture(encoded, width, height)

    def _encoded(self, named: Any) -> tuple[str, bytes]:
        """What to call it, and its bytes."""
        if isinstance(named, Mapping):
            return self._of_mapping(named)
        if isinstance(named, bytes | bytearray | memoryview):
            return "image (bytes)", bytes(named)
        if not isinstance(named, str) or not named.strip():
            raise Unusable(
                "not a picture", f"image is {short(named)}, not a file name, bytes or base64"
            )
        if named.startswith("data:"):
            return "image (a data URL)", _of_data_url(named)
        if named.startswith("file://"):
            return self._of_file(unquote(urlsplit(named).path))
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.\-]*://", named):
            raise Unusable(
                "URL",
                f"image is a URL ({short(named)}), and nothing is fetched; download the pictures "
                "and name the files",
            )
        if len(named) > _LONG:
            return "image (base64)", _of_base64(named)
        return self._of_file(named)

    def _of_mapping(self, named: Mapping[str, Any]) -> tuple[str, bytes]:
        """`datasets` stores {bytes, path}, of which either may be missing."""
        if set(named) - _KNOWN:
            raise Unusable("not a picture", f"image is {short(dict(named))}; give bytes or a path")
        for key in ("bytes", "data", "path", "url"):
            if not is_empty(value := named.get(key)):
                if key in ("bytes", "data") and isinstance(value, str):
                    return "image (base64)", _of_base64(value)
                return self._encoded(value)
        raise Unusable("not a picture", f"image is {short(dict(named))}, without bytes or a path")

    def _of_file(self, name: str) -> tuple[str, bytes]:
        try:
            paths = [folder / name for folder in self.folders]
            path = next((path for path in paths if path.exists()), paths[0])
            return f"image {name}", path.read_bytes()
        except OSError as error:
            if len(name) >= _SHORTEST and _BASE64.fullmatch(name) and _is_picture(name):
                return "image (base64)", _of_base64(name)
            raise Unusable("picture missing", f"image {name}: {error.strerror}") from None
        except ValueError as error:  # a NUL in the name
            raise Unusable("picture missing", f"image {name!r}: {error}") from None


def _is_picture(text: str) -> bool:
    """Whether base64 holds one; a name of a file may look like base64."""
    try:
        display_size(_of_base64(text))
    except (ImageError, Unusable):
        return False
    return True


def _of_data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise Unusable("not a picture", f"image is a data URL without data ({short(url)})")
    return _of_base64(body) if head.endswith(";base64") else unquote_to_bytes(body)


def _of_base64(text: str) -> bytes:
    standard = text.translate(str.maketrans("-_", "+/", " \r\n\t"))
    try:
        return base64.b64decode(standard + "=" * (-len(standard) % 4), validate=True)
    except binascii.Error as error:
        raise Unusable(
            "not a picture", f"image is no file name and no base64 ({short(text)}): {error}"
        ) from None
