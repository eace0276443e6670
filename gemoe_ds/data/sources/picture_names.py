"""What is seen to be a picture without opening it: the name of a file, its bytes, or both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"),
    *(".jp2", ".avif", ".heic", ".heif", ".svg", ".ppm", ".pgm"),
)
_LONGEST = 300  # characters of a name
_BEGINS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*")


def is_picture(value: Any) -> bool:
    """Whether a value names or holds a picture, or is a list of such values."""
    if isinstance(value, str):
        return len(value) <= _LONGEST and "\n" not in value and value.lower().endswith(ENDINGS)
    if isinstance(value, bytes):
        return value.startswith(_BEGINS) or (value[:4] == b"RIFF" and value[8:12] == b"WEBP")
    if isinstance(value, Mapping):  # as `datasets` stores it
        return set(value) == {"bytes", "path"} and any(map(is_picture, value.values()))
    return isinstance(value, list) and bool(value) and all(map(is_picture, value))
