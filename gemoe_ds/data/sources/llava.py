"""LLaVA-format JSON + image folder -> checked shards (gemoe_ds/data/sample.py).

Reads what LLaVA-Pretrain (558k) and mix665k hold: `<image>` first or last in the first question,
text-only rows without `image`, string or integer ids, other keys, many turns. Every image is
decoded here, so that no step of a training run meets a broken one; the encoded bytes are kept as
they are. Rows that cannot be used are dropped, counted and listed with the reason, among them all
that hold what is not supported; keys that are not read are named. Too many rows of another format
are refused before the first image is read. A row without an id is called by its number.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections import Counter, deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from gemoe_ds.console import Progress
from gemoe_ds.data.dropped import DropList, Dropped
from gemoe_ds.data.sample import Sample, of_turns, write_samples
from gemoe_ds.data.sources.json_file import read_json
from gemoe_ds.data.sources.llava_rows import Unusable, notes, printable, read_picture, read_turns
from gemoe_ds.errors import DataError

Job = tuple[str, Any, Any]  # id, row, kinds of its questions
Converted = tuple[list[Sample | Dropped], list[str]]  # in the order of the rows; notes on them


def jobs(rows: list[Any], kinds: dict[str, Any]) -> Iterator[Job]:
    """Every row with its id as a string and its own kinds: all that a worker needs."""
    for number, row in enumerate(rows):
        found = row.get("id") if isinstance(row, dict) else None
        has_id = isinstance(found, str | int | float) and found == found  # not NaN
        row_id = printable(str(found)) if has_id else f"row {number}"
        yield row_id, row, kinds.get(row_id)


def read_kinds(path: Path, ids: Counter[str]) -> dict[str, Any]:
    """The kinds of the questions by the id of their row, which must then be one row's alone."""
    kinds: dict[str, Any] = read_json(path, dict)
    if several := [row_id for row_id in kinds if ids[row_id] > 1]:
        raise DataError(f"--kinds {path}: {len(several)} ids, {several[0]!r} first, name two rows")
    if kinds and not any(row_id in ids for row_id in kinds):
        raise DataError(f"--kinds {path}: none of its {len(kinds)} ids is the id of a row")
    return kinds


def convert_row(job: Job, images: Path, min_size: int) -> Sample | Dropped:
    """One row of the JSON as a Sample, or the reason why it cannot be one."""
    row_id, row, kinds = job
    try:
        turns = read_turns(row, kinds)
        image = read_picture(row, images, min_size)
    except Unusable as why:
        return Dropped(row_id, printable(str(why)), why.group)
    return of_turns(row_id, image, turns)


def check_texts(rows: list[Any], kinds: dict[str, Any], source: str, max_bad: float) -> None:
    """DataError at once, before any picture is decoded, if too many rows are of another format."""
    dropped = DropList()
    for row_id, row, its_kinds in jobs(rows, kinds):
        try:
            read_turns(row, its_kinds)
        except Unusable as why:
            dropped.append(Dropped(row_id, printable(str(why)), why.group))
    dropped.check(source, len(rows), max_bad)


def convert_rows(
    rows: list[Any],
    kinds: dict[str, Any],
    images: Path,
    min_size: int,
    workers: int,
    counted: Counter[str],
) -> Generator[Sample | Dropped, None, None]:
    """The rows in order, converted by `workers` threads; `counted` takes the notes on them.

    Threads, not processes: Pillow decodes without the interpreter lock, and a process that is
    killed while it sends a picture leaves its parent waiting for the rest. Few rows are under way
    at a time, because what is converted waits in memory until it is written.
    """
    pending, under_way = jobs(rows, kinds), deque[Future[Converted]]()

    def convert_chunk(chunk: list[Job]) -> Converted:
        found = [convert_row(job, images, min_size) for job in chunk]
        pairs = zip(chunk, found, strict=True)
        kept = [(job[1], sample) for job, sample in pairs if isinstance(sample, Sample)]
        return found, [note for row, sample in kept for note in notes(row, sample)]

    bar = Progress(total=len(rows), desc="converting", unit="row")
    pool = ThreadPoolExecutor(workers)
    try:
        while True:
            while len(under_way) < 4 * workers and (chunk := list(itertools.islice(pending, 32))):
                under_way.append(pool.submit(convert_chunk, chunk))
            if not under_way:
                return
            converted, found_notes = under_way.popleft().result()
            counted.update(found_notes)
            yield from converted
            bar.update(len(converted))
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()


def convert(arguments: argparse.Namespace) -> None:
    if not arguments.images.is_dir():
        raise DataError(f"--images {arguments.images}: no such folder")
    rows = read_json(arguments.json, list)
    ids = Counter(row_id for row_id, *_ in jobs(rows, {}))
    kinds = read_kinds(arguments.kinds, ids) if arguments.kinds else {}
    check_texts(rows, kinds, str(arguments.json), arguments.max_bad_fraction)
    counted: Counter[str] = Counter()
    if repeated := ids.total() - len(ids):
        counted["an earlier row has the same id"] = repeated
    converted = convert_rows(
        rows, kinds, arguments.images, arguments.min_image_size, arguments.workers, counted
    )
    with warnings.catch_warnings(), closing(converted):
        warnings.simplefilter("ignore")  # odd EXIF and palettes are no reason to complain
        manifest = write_samples(
            converted,
            arguments.out,
            source=str(arguments.json),
            shard_size=arguments.shard_size,
            max_bad_fraction=arguments.max_bad_fraction,
            notes=counted,
        )
    print(
        f"{arguments.out}: {manifest['num_samples']} samples in {len(manifest['shards'])} shards, "
        f"{manifest['num_dropped']} rows dropped"
    )
    for group in manifest["dropped_groups"]:
        print(f"  dropped {group['rows']} ({group['group']}); first: {group['first']}")
    for note, count in manifest["notes"].items():
        print(f"  {count} rows: {note}")
