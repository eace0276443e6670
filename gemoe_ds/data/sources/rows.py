"""Rows of a store -> samples: read by one format, with their pictures decoded, by threads."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemoe_ds.console import Progress
from gemoe_ds.data.dropped import DropList, Dropped
from gemoe_ds.data.images import has_more_frames
from gemoe_ds.data.sources.formats import RowFormat
from gemoe_ds.data.sources.formats.base import Columns, Draft, pictures_of
from gemoe_ds.data.sources.lost_keys import elsewhere, picture_key
from gemoe_ds.data.sources.pictures import PictureReader
from gemoe_ds.data.sources.stores import Store
from gemoe_ds.data.sources.unusable import Unusable, printable, short
from gemoe_ds.data.turn import Sample, fault
from gemoe_ds.errors import DataError

Numbered = tuple[int, tuple[Path, Any]]  # a row, the folder of its file and its number
_CHUNK = 16  # rows that a thread takes at once
_AHEAD = 2  # chunks a thread that may wait to be written
_SNIFFED = 100  # rows by which the format is chosen
_LOOKED_AT = 1000  # rows that are read first where a pass over all costs too much


@dataclass(frozen=True)
class Converted:
    """What became of a row, and what is worth saying of it."""

    result: Sample | Dropped
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reader:
    """How the rows of one source are read."""

    store: Store
    format: type[RowFormat]
    columns: Columns
    pictures: PictureReader
    source: str = ""

    def draft(self, number: int, row: Any) -> tuple[Draft, str]:
        """What row `number` says, and its source; Unusable says why not."""
        if isinstance(row, Unusable):
            raise row
        if not isinstance(row, Mapping):
            raise Unusable("not an object", f"the row is {short(row)}, not an object")
        kinds = self.columns.kinds.get(id_of(number, row))
        return self.format.read(row, self.columns, kinds), self._source_of(row)

    def convert(self, number: int, row: Any, folder: Path) -> Converted:
        """A row of a file in `folder` as a Sample, or the reason why it cannot be one."""
        row_id = id_of(number, row)
        try:
            draft, source = self.draft(number, row)
            images = tuple(map(self.pictures.beside(folder), draft.pictures))
            sample = Sample(row_id, draft.messages, images, source)
            if why := fault(sample):
                raise Unusable("not a conversation", why)
        except Unusable as why:
            return Converted(Dropped(row_id, printable(str(why)), why.group))
        more = [] if not any(has_more_frames(image.data) for image in images) else [_FRAMES]
        return Converted(sample, (*draft.notes, *more))

    def _source_of(self, row: Mapping[str, Any]) -> str:
        if self.columns.source is None:
            return self.source
        if not isinstance(found := row.get(self.columns.source), str):
            raise Unusable(
                "no source",
                f"its {self.columns.source!r} is {short(found)}, not the name of a source",
            )
        return printable(found)


_FRAMES = "an animation or several pages, of which the first is read"


def id_of(number: int, row: Any) -> str:
    """The row's own id as a string, or its number."""
    found = None
    if isinstance(row, Mapping):
        found = row.get("id") if row.get("id") is not None else row.get("__key__")
    has_id = isinstance(found, str | int | float) and found == found  # not NaN
    return printable(str(found)) if has_id else f"row {number}"


def format_of(store: Store, columns: Columns) -> type[RowFormat] | None:
    """The format that accepts most of the first rows; None for a store without rows.

    Unusable names the keys of the first row if no format accepts any.
    """
    formats = sorted(RowFormat.known(), key=lambda known: -known.rank)
    accepted: Counter[type[RowFormat]] = Counter()
    first: Any = None
    for number, row in enumerate(itertools.islice(store.rows(), _SNIFFED)):
        if number == 0:
            first = row
        if isinstance(row, Mapping):
            accepted.update([f for f in formats if f.accepts(row, columns)][:1])
    if accepted:
        return accepted.most_common(1)[0][0]
    if first is None:
        return None
    raise Unusable("unknown", _unknown(first, columns))


def _unknown(row: Any, columns: Columns) -> str:
    if isinstance(row, Unusable):
        return str(row)
    if not isinstance(row, Mapping):
        return f"no format fits: the first row is {short(row)}, not an object"
    keys = f"no format fits: the first row has the keys {', '.join(map(str, row))}"
    if pictures_of(row, columns):
        return f"{keys}: a picture, and no text under txt, caption or text; --text-column names one"
    if key := picture_key(row):
        return f"{keys}; {elsewhere(key)}"
    known = ", ".join(RowFormat.names())
    return (
        f"{keys}; known are {known} (--format); --text-column names the column of a plain text; "
        'of a chat write {"messages": [{"role": "user", "content": ...}, {"role": "assistant", '
        '"content": ...}]}'
    )


def look(reader: Reader, name: str, max_bad: float, *, all_rows: bool) -> int | None:
    """Read the texts before any picture is decoded; the number of rows, if all were read.

    DataError at once if too many rows are of another format, or none has the column of pictures.
    """
    dropped, total, column = DropList(), 0, reader.columns.image
    has_column = column is None
    rows = reader.store.rows()
    for number, row in enumerate(rows if all_rows else itertools.islice(rows, _LOOKED_AT)):
        total += 1
        has_column = has_column or (isinstance(row, Mapping) and column in row)
        try:
            reader.draft(number, row)
        except Unusable as why:
            dropped.append(Dropped(id_of(number, row), printable(str(why)), why.group))
    dropped.check(name, total, max_bad)
    if not has_column and (all_rows or total < _LOOKED_AT):
        raise DataError(f"{name}: --image-column {column}: no row has this key")
    return total if all_rows else None


def converted(
    reader: Reader, start: int, workers: int, total: int | None = None
) -> Generator[Converted, None, None]:
    """The rows from number `start` on, in order, converted by `workers` threads.

    Threads, not processes: Pillow decodes without the interpreter lock, and a process that is
    killed while it sends a picture leaves its parent waiting for the rest. Few rows are under way
    at a time, because what is converted waits in memory until it is written.
    """
    pending = itertools.islice(enumerate(reader.store.placed_rows()), start, None)
    under_way = deque[Future[list[Converted]]]()

    def convert_chunk(chunk: list[Numbered]) -> list[Converted]:
        return [reader.convert(number, row, folder) for number, (folder, row) in chunk]

    bar = Progress(total=total, initial=start, desc="converting", unit="row")
    pool = ThreadPoolExecutor(workers)
    try:
        while True:
            while len(under_way) < _AHEAD * workers and (chunk := _take(pending)):
                under_way.append(pool.submit(convert_chunk, chunk))
            if not under_way:
                return
            for done in under_way.popleft().result():
                yield done
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()


def _take(pending: Iterator[Numbered]) -> list[Numbered]:
    return list(itertools.islice(pending, _CHUNK))
