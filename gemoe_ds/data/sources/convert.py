"""What users have -> a checked folder of samples (gemoe_ds/data/schema.py); killed, it goes on.

The source is seen for what it is, its texts are read before the first picture, and every picture is
decoded, so that no step of a training run meets a broken one. Rows that cannot be used are dropped,
counted and listed with the reason, among them all that hold what is not supported; keys that are
not read are named. A row without an id is called by its number.
"""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemoe_ds import __version__
from gemoe_ds.data.dropped import DUPLICATE, MAX_BAD_FRACTION, Dropped
from gemoe_ds.data.partial import Identity, PartialFolder, RowCounts, fingerprint_of, open_partial
from gemoe_ds.data.sample_writer import WrittenShard, manifest_of, write_shard
from gemoe_ds.data.schema import SCHEMA, StoredPictures
from gemoe_ds.data.shards import ArrowShard
from gemoe_ds.data.sources.formats import RowFormat
from gemoe_ds.data.sources.formats.base import Columns
from gemoe_ds.data.sources.kinds import read_kinds, repeated_ids
from gemoe_ds.data.sources.options import refuse_unused
from gemoe_ds.data.sources.pictures import PictureReader
from gemoe_ds.data.sources.rows import Converted, Reader, converted, format_of, look
from gemoe_ds.data.sources.stores import Store, open_store
from gemoe_ds.data.sources.unusable import Unusable
from gemoe_ds.data.turn import Sample
from gemoe_ds.errors import DataError, Stopped
from gemoe_ds.files import check_new, termination_raises

_AGAIN = "an earlier row has the same id"


@dataclass(frozen=True)
class Settings:
    """What to convert, and how; as the command line has it."""

    path: Path
    out: Path
    format: str | None = None
    images: Path | None = None
    kinds: Path | None = None
    source: str = ""
    columns: Columns = field(default_factory=Columns)
    split: str | None = None
    config: str | None = None
    documents: str = "file"
    shard_size: int = 4096
    min_image_size: int = 4
    max_bad_fraction: float = MAX_BAD_FRACTION
    drop_duplicates: bool = False
    workers: int = 2


def convert(settings: Settings) -> dict[str, Any]:
    """Convert, print what the source is and what became of it, and return the manifest."""
    check_new(settings.out)
    reader = _reader(settings)
    name = str(settings.path)
    remark = reader.store.remark()
    what = f"{reader.store.title} of {reader.format.title}"
    print(f"{name} reads as: {what}" + (f"; {remark}" if remark else ""), flush=True)
    identity = _identity(settings, reader)
    with warnings.catch_warnings(), termination_raises():
        warnings.simplefilter("ignore")  # odd EXIF and palettes are no reason to complain
        with open_partial(settings.out, identity) as partial:
            try:
                manifest = _filled(partial, reader, settings, name, identity["files"])
            except (KeyboardInterrupt, SystemExit):
                raise Stopped(_kept_words(partial)) from None
    _say(settings.out, manifest)
    return manifest


def _kept_words(partial: PartialFolder) -> str:
    if not partial.shards:
        return "no shard was finished, and nothing is kept"
    return (
        f"{len(partial.shards)} finished shards of {partial.num_samples} samples stay in "
        f"{partial.path}; the same command goes on behind them"
    )


def _filled(
    partial: PartialFolder, reader: Reader, settings: Settings, name: str, files: list[Any]
) -> dict[str, Any]:
    """`files`: their fingerprint when they were first seen."""
    if partial.is_complete:
        return partial.complete(settings.out)
    total = None
    if partial.shards:
        print(
            f"{partial.path}: {len(partial.shards)} shards of {partial.num_samples} samples are "
            "finished; going on behind them",
            flush=True,
        )
    else:
        total = look(reader, name, settings.max_bad_fraction, all_rows=reader.store.is_cheap)

    def rows_from(start: int) -> Generator[Converted, None, None]:
        return converted(reader, start, settings.workers, total)

    shards, counts = _write(partial, rows_from, settings)
    if fingerprint_of(_files_of(settings, reader)) != files:
        raise DataError(
            f"{name}: its files have changed while they were read; remove {partial.path}, and "
            "convert what they are now"
        )
    num_samples = sum(shard.num_samples for shard in shards)
    try:
        num_rows = num_samples + len(counts.dropped)
        counts.dropped.check(name, num_rows, settings.max_bad_fraction)
    except DataError as error:
        if not partial.shards:
            raise
        raise DataError(
            f"{error}; {partial.path} stays: the same command with another --max-bad-fraction goes "
            "on; to convert other rows remove it"
        ) from None
    notes = counts.notes
    if again := repeated_ids(shards):
        notes = Counter({_AGAIN: again}) + notes
    manifest = manifest_of(shards, counts.dropped, name, notes)
    partial.commit(manifest, settings.out)
    return manifest


def _write(
    partial: PartialFolder,
    rows_from: Callable[[int], Generator[Converted, None, None]],
    settings: Settings,
) -> tuple[list[WrittenShard], RowCounts]:
    """All shards, behind those that are finished, and what was met in all rows."""
    whole, stored = RowCounts(), StoredPictures()
    row = 0
    for finished in partial.shards:
        whole.add(finished.counts)
        _remember(ArrowShard(finished.path, finished.group_sizes), row, stored)
        row += finished.num_samples
    known = {digest for shard in partial.shards for digest in shard.contents}
    shards: list[WrittenShard] = [*partial.shards]
    with closing(rows_from(partial.num_rows)) as rows:
        num_rows, first_row = partial.num_rows, partial.num_samples
        while True:
            part = _Part(rows, num_rows, known if settings.drop_duplicates else None)
            kept = part.samples(settings.shard_size)
            if (first := next(kept, None)) is None:
                whole.add(part.counts)
                return shards, whole
            some = itertools.chain([first], kept)
            shard = write_shard(some, partial.next_path(), first_row, stored)
            whole.add(part.counts)
            num_rows, first_row = part.num_rows, first_row + shard.num_samples
            if shard.num_samples < settings.shard_size:  # the last one
                return [*shards, shard], whole
            shards.append(partial.finish(shard, num_rows, part.counts, part.contents))


def _remember(shard: ArrowShard, row: int, stored: StoredPictures) -> None:
    """The pictures of a finished shard, whose first row this is."""
    for group, size in enumerate(shard.group_sizes):
        images = shard.group(group)["images"]
        for number in range(size):
            found = images[number].values
            for place, data in enumerate(found.field("bytes").to_pylist() if found else []):
                if data is not None:
                    stored.earlier(data, row + number, place)
        row += size


class _Part:
    """The rows of one shard, while they are read: what they hold but for the samples."""

    def __init__(self, rows: Iterator[Converted], num_rows: int, known: set[str] | None) -> None:
        self.rows, self.num_rows, self.known = rows, num_rows, known
        self.counts = RowCounts()
        self.contents: list[str] = []

    def samples(self, limit: int) -> Iterator[Sample]:
        """So many at most. No row is read behind the last one of them."""
        found = 0
        for row in self.rows:
            self.num_rows += 1
            result = self._first_of_its_kind(row.result)
            if isinstance(result, Dropped):
                self.counts.dropped.append(result)
                continue
            self.counts.notes.update(row.notes)
            found += 1
            yield result
            if found == limit:
                return

    def _first_of_its_kind(self, result: Sample | Dropped) -> Sample | Dropped:
        if self.known is None or isinstance(result, Dropped):
            return result
        digest = content_digest(result)
        if digest in self.known:
            reason = "an earlier row has the same messages and pictures"
            return Dropped(result.id, reason, DUPLICATE)
        self.known.add(digest)
        self.contents.append(digest)
        return result


def content_digest(sample: Sample) -> str:
    """The same for samples of the same messages and pictures, whatever they are called."""
    digest = hashlib.blake2b(digest_size=16)
    for message in sample.messages:
        digest.update(repr((message.role, message.content, message.loss)).encode())
    for picture in sample.images:
        digest.update(hashlib.blake2b(picture.data, digest_size=16).digest())
    return digest.hexdigest()


def _reader(settings: Settings) -> Reader:
    """What the source is; DataError if it is nothing that is known."""
    if settings.images is not None and not settings.images.is_dir():
        raise DataError(f"--images {settings.images}: no such folder")
    if settings.source and settings.columns.source:
        raise DataError(
            f"--source {settings.source} and --source-column {settings.columns.source}: give one"
        )
    store = open_store(
        settings.path,
        split=settings.split,
        config=settings.config,
        documents=settings.documents,
    )
    given = _given(settings)
    refuse_unused(given, store, Store.known())
    columns = settings.columns
    if settings.format is not None:
        chosen = RowFormat.named(settings.format)
    else:
        try:
            chosen = format_of(store, columns) or RowFormat.named("conversations")
        except Unusable as why:
            raise DataError(f"{settings.path}: {_read_as(store)}{why}") from None
    refuse_unused(given, chosen, RowFormat.known())
    if settings.kinds is not None:
        columns = columns.with_kinds(read_kinds(settings.kinds, store))
    pictures = PictureReader((settings.images or store.folder,), settings.min_image_size)
    return Reader(store, chosen, columns, pictures, settings.source)


def _read_as(store: Store) -> str:
    """Of a folder of which not all is read, what is not: the rows may be there."""
    return f"{store.title}; {remark}: " if (remark := store.remark()) else ""


def _given(settings: Settings) -> dict[str, Any]:
    """The options that not every store or format uses, of those that were given."""
    columns = settings.columns
    options = {
        "--split": settings.split,
        "--config": settings.config,
        "--documents": settings.documents if settings.documents != "file" else None,
        "--images": settings.images,
        "--text-column": columns.text if columns.text != Columns.text else None,
        "--image-column": columns.image,
        "--question": columns.question,
    }
    return {option: value for option, value in options.items() if value is not None}


def _files_of(settings: Settings, reader: Reader) -> list[Path]:
    return [*reader.store.files(), *([settings.kinds] if settings.kinds else [])]


def _identity(settings: Settings, reader: Reader) -> Identity:
    """All that the bytes of the folder depend on, but for the files of pictures."""
    columns = reader.columns
    return {
        "version": f"{__version__}, schema {SCHEMA}",
        "source": str(settings.path),
        "files": fingerprint_of(_files_of(settings, reader)),
        "format": reader.format.name,
        "images": str(settings.images),
        "kinds": str(settings.kinds),
        "name": settings.source,
        "columns": [columns.text, columns.image, columns.source, columns.question],
        "split": settings.split,
        "config": settings.config,
        "documents": settings.documents,
        "shard_size": settings.shard_size,
        "min_image_size": settings.min_image_size,
        "dedup": settings.drop_duplicates,
    }


def _say(out: Path, manifest: dict[str, Any]) -> None:
    print(
        f"{out}: {manifest['num_samples']} samples in {len(manifest['shards'])} shards, "
        f"{manifest['num_dropped']} rows dropped"
    )
    for group in manifest["dropped_groups"]:
        print(f"  dropped {group['rows']} ({group['group']}); first: {group['first']}")
    for note, count in manifest["notes"].items():
        print(f"  {count} rows: {note}")
