"""Samples as rows of Arrow batches: the columns of schema 2, and how those of schema 1 are read.

    id, source   text
    images       list of {bytes, width, height, row, place}: a picture that an earlier sample has is
                 stored there, and null here: row number in the folder, place among its pictures
    messages     list of {role, content, loss, kind}

Schema 1 has id, image (bytes or null) and turns, a list of {human, gpt, kind}, in parquet files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from gemoe_ds.data.turn import Message, Picture, Sample, Turn, of_turns

SCHEMA, READ = 2, (1, 2)
MANIFEST = "manifest.json"

_PICTURE = pa.struct(
    [
        ("bytes", pa.binary()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("row", pa.int64()),
        ("place", pa.int32()),
    ]
)
_MESSAGE = pa.struct(
    [("role", pa.string()), ("content", pa.string()), ("loss", pa.bool_()), ("kind", pa.string())]
)
COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("images", pa.list_(_PICTURE)),
        ("messages", pa.list_(_MESSAGE)),
    ]
)

ReadPicture = Callable[[int, int], bytes]  # row and place -> the bytes that are stored there


class StoredPictures:
    """Where each picture of a folder is stored: its first row and place there.

    16 bytes of a hash stand for a picture, so that 665k of them take about 150 MB.
    """

    def __init__(self) -> None:
        self._places: dict[bytes, tuple[int, int]] = {}

    def earlier(self, data: bytes, row: int, place: int) -> tuple[int, int] | None:
        """Where this picture is stored already; None if now it is, here."""
        key = hashlib.sha256(data).digest()[:16]  # which processors have instructions for
        found = self._places.setdefault(key, (row, place))
        return None if found == (row, place) else found


def row_of(sample: Sample, row: int, stored: StoredPictures) -> tuple[dict[str, Any], int]:
    """A sample as the columns have it in this row of a folder, and roughly its bytes there."""
    images: list[dict[str, Any]] = []
    size = 0
    for place, picture in enumerate(sample.images):
        found = stored.earlier(picture.data, row, place)
        size += 0 if found else len(picture.data)
        images.append(
            {"bytes": None, "row": found[0], "place": found[1]}
            if found
            else {"bytes": picture.data}
        )
        images[-1] |= {"width": picture.width, "height": picture.height}
    messages = [
        {"role": m.role, "content": m.content, "loss": m.loss, "kind": m.kind}
        for m in sample.messages
    ]
    size += sum(len(message.content) for message in sample.messages)
    columns = {"id": sample.id, "source": sample.source, "images": images, "messages": messages}
    return columns, size


def batch_of(rows: Sequence[dict[str, Any]]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(list(rows), COLUMNS)


def sample_of(batch: pa.RecordBatch, row: int, stored: ReadPicture | None) -> Sample:
    """The sample in a row of a batch; without `stored` its pictures have no data."""
    pictures = batch["images"][row].values
    widths, heights = (pictures.field(name).to_pylist() for name in ("width", "height"))
    data = [b""] * len(widths)
    if stored:
        data = [
            stored(picture["row"].as_py(), picture["place"].as_py()) if own is None else own
            for own, picture in zip(pictures.field("bytes").to_pylist(), pictures, strict=True)
        ]
    return Sample(
        batch["id"][row].as_py(),
        tuple(Message(**message) for message in batch["messages"][row].as_py()),
        tuple(map(Picture, data, widths, heights)),
        batch["source"][row].as_py(),
    )


def stored_in(batch: pa.RecordBatch, row: int, index: int) -> list[tuple[int, int]]:
    """Row and place where each picture of a sample is stored, of the sample `index` in this row."""
    pictures = batch["images"][row].values
    places = (pictures.field(name).to_pylist() for name in ("row", "place"))
    return [
        (index, number) if at is None else (at, place)
        for number, (at, place) in enumerate(zip(*places, strict=True))
    ]


def picture_in(batch: pa.RecordBatch, row: int, place: int) -> bytes:
    """The bytes that are stored there."""
    data: bytes = batch["images"][row].values.field("bytes")[place].as_py()
    return data


def first_schema(table: pa.Table, row: int) -> Sample:
    """The sample in a row of a group of schema 1."""
    turns = (Turn(t["human"], t["gpt"], t["kind"]) for t in table["turns"][row].as_py())
    return of_turns(table["id"][row].as_py(), table["image"][row].as_py(), turns)
