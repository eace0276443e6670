#!/usr/bin/env python3
"""LLaVA-format JSON + image folder -> checked parquet shards (gemoe_ds/data/sample.py).

Reads what LLaVA-Pretrain (558k) and mix665k hold: `<image>` first or last in the first question,
text-only rows without `image`, string or integer ids, other keys, many turns. Every image is
decoded here, so that no step of a training run meets a broken one; the encoded bytes are kept as
they are. Rows that cannot be used are dropped, counted and listed with the reason; a row without
an id is called by its number.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from gemoe_ds.data.images import read_image
from gemoe_ds.data.sample import Dropped, Sample, Turn, write_samples
from gemoe_ds.errors import DataError, ImageError, exit_on_error

MARKER = "<image>"
SPEAKERS = ("human", "gpt")


Job = tuple[str, Any, Any]  # id, row, kinds of its questions


def jobs(rows: list[Any], kinds: dict[str, Any]) -> Iterator[Job]:
    """Every row with its id as a string and its own kinds: all that a worker needs."""
    for number, row in enumerate(rows):
        found = row.get("id") if isinstance(row, dict) else None
        row_id = f"row {number}" if found is None else _printable(str(found))
        yield row_id, row, kinds.get(row_id)


def convert_row(job: Job, images: Path, min_size: int) -> Sample | Dropped:
    """One row of the JSON as a Sample, or the reason why it cannot be one."""
    row_id, row, kinds = job
    try:
        turns = _turns(row, kinds)
        image = _image(row, images, min_size)
    except _Unusable as reason:
        return Dropped(row_id, _printable(str(reason)))
    return Sample(row_id, image, turns)


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class _Unusable(Exception):
    """Why a row is dropped."""


def _turns(row: Any, kinds: Any) -> tuple[Turn, ...]:
    messages = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages or len(messages) % 2:
        raise _Unusable("conversations is not a list of question and answer pairs")
    texts = []
    for index, message in enumerate(messages):
        speaker = SPEAKERS[index % 2]
        if not isinstance(message, dict) or message.get("from") != speaker:
            raise _Unusable(f"message {index} is not from {speaker!r}")
        if not isinstance(message.get("value"), str):
            raise _Unusable(f"message {index} has no text")
        if message["value"] != _printable(message["value"]):  # half a surrogate pair
            raise _Unusable(f"message {index} is not valid Unicode")
        texts.append(message["value"].strip())
    has_image = row.get("image") is not None
    if sum(text.count(MARKER) for text in texts) != has_image or (
        has_image and MARKER not in texts[0]
    ):
        raise _Unusable(f"expected {int(has_image)} {MARKER} in the first question")
    texts[0] = texts[0].replace(MARKER, "").strip()
    if not all(texts[1::2]):
        raise _Unusable("an answer is empty")
    if kinds is not None and not (
        isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)
    ):
        raise _Unusable("its kinds are not a list of names")
    if kinds is not None and len(kinds) != len(texts) // 2:
        raise _Unusable(f"{len(kinds)} kinds for {len(texts) // 2} questions")
    names = kinds or [None] * (len(texts) // 2)
    return tuple(
        Turn(human, gpt, kind)
        for human, gpt, kind in zip(texts[::2], texts[1::2], names, strict=True)
    )


def _image(row: dict[str, Any], images: Path, min_size: int) -> bytes | None:
    name = row.get("image")
    if name is None:
        return None
    if not isinstance(name, str):
        raise _Unusable(f"image is {name!r}, not one file name")
    try:
        encoded = (images / name).read_bytes()
    except OSError as error:
        raise _Unusable(f"image {name}: {error.strerror}") from None
    except ValueError as error:  # a NUL in the name
        raise _Unusable(f"image {name!r}: {error}") from None
    try:
        size = read_image(encoded).size
    except ImageError as error:
        raise _Unusable(f"image {name} cannot be decoded: {error}") from None
    if min(size) < min_size:
        raise _Unusable(f"image {name} is {size[0]}x{size[1]}, smaller than {min_size}")
    return encoded


def convert_rows(
    rows: list[Any], kinds: dict[str, Any], images: Path, min_size: int, workers: int
) -> Iterator[Sample | Dropped]:
    """The rows in order, converted by `workers` threads.

    Threads, not processes: Pillow decodes without the interpreter lock, and a process that is
    killed while it sends a picture leaves its parent waiting for the rest. Few rows are under way
    at a time, because what is converted waits in memory until it is written.
    """
    pending, under_way = jobs(rows, kinds), deque[Future[list[Sample | Dropped]]]()

    def convert_chunk(chunk: list[Job]) -> list[Sample | Dropped]:
        return [convert_row(job, images, min_size) for job in chunk]

    bar = tqdm(total=len(rows), desc="converting", unit="row", dynamic_ncols=True)
    pool = ThreadPoolExecutor(workers)
    try:
        while True:
            while len(under_way) < 4 * workers and (chunk := list(itertools.islice(pending, 32))):
                under_way.append(pool.submit(convert_chunk, chunk))
            if not under_way:
                return
            converted = under_way.popleft().result()
            yield from converted
            bar.update(len(converted))
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()


def read_json(path: Path, kind: type) -> Any:
    """A JSON file whose top level is a list or a dict; DataError otherwise."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, kind):
        raise DataError(f"{path}: expected a JSON {kind.__name__}, got {type(content).__name__}")
    return content


def convert(arguments: argparse.Namespace) -> None:
    if not arguments.images.is_dir():
        raise DataError(f"--images {arguments.images}: no such folder")
    rows = read_json(arguments.json, list)
    kinds = read_json(arguments.kinds, dict) if arguments.kinds else {}
    converted = convert_rows(
        rows, kinds, arguments.images, arguments.min_image_size, arguments.workers
    )
    with warnings.catch_warnings(), closing(converted):
        warnings.simplefilter("ignore")  # odd EXIF and palettes are no reason to complain
        manifest = write_samples(
            converted,
            arguments.out,
            source=str(arguments.json),
            shard_size=arguments.shard_size,
            max_bad_fraction=arguments.max_bad_fraction,
        )
    print(
        f"{arguments.out}: {manifest['num_samples']} samples in {len(manifest['shards'])} shards, "
        f"{manifest['num_dropped']} rows dropped"
    )
    for dropped in manifest["dropped"][:5]:
        print(f"  dropped {dropped['id']}: {dropped['reason']}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--json", type=Path, required=True, help="LLaVA-format JSON")
    parser.add_argument("--images", type=Path, required=True, help="folder of the image files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--kinds", type=Path, help='JSON: {"<id>": [kind of each question, ...]}')
    parser.add_argument("--shard-size", type=int, default=4096, help="samples a shard")
    parser.add_argument("--min-image-size", type=int, default=4, help="pixels of the shorter side")
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.2, help="more dropped rows than this: stop"
    )
    parser.add_argument("--workers", type=int, default=2, help="threads that decode images")
    arguments = parser.parse_args(argv)
    for option in ("shard_size", "min_image_size", "workers"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option.replace('_', '-')} must be at least 1")
    if not 0 <= arguments.max_bad_fraction <= 1:
        parser.error("--max-bad-fraction must be from 0 to 1")
    with exit_on_error():
        convert(arguments)


if __name__ == "__main__":
    main()
