"""Tar files in WebDataset's layout: files of one name, up to its first dot, are one row.

`datasets` reads these too, but gives all rows the columns of the first five: the tars of text and
pictures in turn, or of several pictures, are refused or lose some. So this is a reader of its own.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from gemoe_ds.data.sources.json_file import no_key_twice
from gemoe_ds.data.sources.packed import open_unpacked
from gemoe_ds.data.sources.stores.base import Store
from gemoe_ds.data.sources.stores.files import with_suffix
from gemoe_ds.data.sources.unusable import Unusable, is_empty
from gemoe_ds.errors import DataError

Image.init()
_TARS = (".tar", ".tgz")
_OTHERS = (
    ("video", {"mp4", "avi", "mkv", "webm", "mov", "mpg", "mpeg"}),
    ("audio", {"wav", "mp3", "flac", "ogg", "m4a", "opus"}),
)
PICTURES = {
    suffix.removeprefix(".")
    for suffix, format in Image.EXTENSION.items()
    if format in Image.OPEN and format != "MPEG"
}
_NAME = re.compile(r"(?P<key>(?:.*/)?[^/.]+)\.(?P<field>[^/]+)")
_TEXTS = ("txt", "text", "caption", "cls", "id", "key")
_MAC = re.compile(r"(^|/)(\._[^/]*$|__MACOSX/)")  # what macOS adds to every file
_DOT = "because the name ends at its first dot; write no dot before the ending, or other keys"
_NUMBER = re.compile(r"(\d+)")


class WebDataset(Store):
    """A row is what its .json holds, with the picture files of its name as its pictures."""

    name: ClassVar[str] = "webdataset"
    title: ClassVar[str] = "WebDataset tars"
    rank: ClassVar[int] = 2
    is_cheap: ClassVar[bool] = False
    options: ClassVar[frozenset[str]] = frozenset({"--split"})

    @classmethod
    def sees(cls, path: Path) -> bool:
        return bool(with_suffix(path, *_TARS))

    def files(self) -> list[Path]:
        return self._with_suffix(*_TARS)

    def rows_of(self, file: Path) -> Iterator[Any]:
        try:
            with open_unpacked(file) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
                yield from _rows(file, tar)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(f"{file}: it is no whole tar file: {error}") from None


def _rows(file: Path, tar: tarfile.TarFile) -> Iterator[dict[str, Any] | Unusable]:
    key, fields = None, dict[str, bytes]()
    for member in tar:
        name = _NAME.fullmatch(member.name)
        if member.isdir() or _MAC.search(member.name):
            continue
        if not member.isfile():
            yield Unusable("not a row", f"{member.name} is a link, not a file")
            continue
        if name is None:
            yield Unusable(
                "not a row", f"{member.name} has no name before its first dot, or no dot"
            )
            continue
        if name["key"] != key:
            if key is not None:
                yield _row(key, fields)
            key, fields = name["key"], {}
        content = tar.extractfile(member)
        assert content is not None  # a file
        if name["field"] in fields:
            raise DataError(f"{file}: {member.name} is there twice; make the tar again")
        fields[name["field"]] = content.read()
    if key is not None:
        yield _row(key, fields)


def _row(key: str, fields: dict[str, bytes]) -> dict[str, Any] | Unusable:
    row: dict[str, Any] = {"__key__": key}
    pictures = dict[str, bytes]()
    jsons = [field for field in fields if field.rpartition(".")[2].lower() == "json"]
    if len(jsons) > 1:
        said = f"{key}.{jsons[0]} and {key}.{jsons[1]} are files of one row"
        return Unusable("two of a name", f"{said}, {_DOT}")
    try:
        for field, content in fields.items():
            kind = field.rpartition(".")[2].lower()
            if kind in PICTURES:
                pictures[field] = content
            else:
                _add(row, key, _content(key, field, kind, content))
    except Unusable as why:
        return why
    return _with_pictures(row, key, pictures) if pictures else row


def _content(key: str, field: str, kind: str, content: bytes) -> dict[str, Any]:
    """What a file that is no picture adds to its row."""
    try:
        if kind == "json":
            said = json.loads(content, object_pairs_hook=no_key_twice)
            return said if isinstance(said, dict) else {"conversations": said}
        if kind in _TEXTS:
            return {field: content.decode().rstrip("\r\n")}  # the last line's end is the file's
    except (ValueError, RecursionError) as error:
        raise Unusable("not valid", f"{key}.{field}: not valid {kind}: {error}") from None
    return {next((name for name, kinds in _OTHERS if kind in kinds), field): content}


def _add(row: dict[str, Any], key: str, said: Mapping[str, Any]) -> None:
    """Unusable for what another file of the row says otherwise."""
    for name, value in said.items():
        if name != "__key__" and row.get(name, value) != value:
            raise Unusable(
                "two of a name",
                f"two files of the row {key} have a {name!r}, and not the same, {_DOT}",
            )
        row[name] = value


def _with_pictures(row: dict[str, Any], key: str, pictures: dict[str, bytes]) -> dict[str, Any]:
    """The pictures of a row: in the order of `image` or `images` in its JSON if these name them.

    A JSON that names more or fewer is left with both, which is refused by name.
    """
    named: Any = next(
        (row[name] for name in ("image", "images") if not is_empty(row.get(name))), []
    )
    names = named if isinstance(named, list) else [named]
    members = {f"{key}.{field}".rpartition("/")[2]: field for field in pictures}
    in_order = [members.get(str(name).rpartition("/")[2]) for name in names]
    fields = sorted(pictures, key=_in_order)
    if sorted(filter(None, in_order)) == sorted(pictures):
        fields = [field for field in in_order if field]
    row["images"] = [pictures[field] for field in fields]
    if len(names) in (0, len(fields)):
        row.pop("image", None)
    elif "image" not in row:
        row["image"] = names
    return row


def _in_order(field: str) -> list[Any]:
    """1.jpg, 2.jpg, ... 10.jpg."""
    return [int(part) if part.isdigit() else part for part in _NUMBER.split(field)]
