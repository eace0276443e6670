"""JSON, JSON lines, parquet, arrow, WebDataset, text ... -> checked samples that a run reads.

What SOURCE is, is seen from its content and said in one line. Killed or stopped, the conversion
keeps its finished shards in OUT.partial, and the same command goes on.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from gemoe_ds.data.dropped import MAX_BAD_FRACTION
from gemoe_ds.errors import exit_on_error
from gemoe_ds.parser import Parser, at_least_one

_MOST_WORKERS = 8  # what Python itself does is one thread's: more gain nothing


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    arguments = parser.parse_or_exit(argv)
    if not 0 <= arguments.max_bad_fraction <= 1:
        parser.error("--max-bad-fraction must be from 0 to 1")
    if (arguments.json is None) == (arguments.path is None):
        parser.error("give one SOURCE, as the first word (or, as before, behind --json)")
    with exit_on_error():
        _convert(arguments)


def _parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("path", nargs="?", type=Path, metavar="SOURCE", help="file or folder to convert")
    add("--out", type=Path, required=True, help="folder to write; must not exist")
    add("--images", type=Path, help="folder of the picture files (default: beside SOURCE)")
    add(
        "--format",
        help="conversations, conversation, messages, alpaca, texts, text or captions (default: as "
        "seen)",
    )
    add("--split", help="of a set that has several, such as train")
    add("--config", help="configuration of a hub's set that has several")
    add("--source", default="", help="a name that every sample has, for metrics by source")
    add("--source-column", help="or the column that has it")
    add("--text-column", default="text", help="of plain text (default: text)")
    add("--image-column", help="of pictures, beside image and images")
    add("--question", help="what a caption without a question is the answer to")
    add(
        "--documents",
        choices=("file", "paragraph", "line"),
        default="file",
        help="what of a text file is one document (default: file)",
    )
    add("--kinds", type=Path, help='JSON: {"<id>": [kind of each question, ...]}')
    add("--dedup", choices=("exact",), help="drop samples of the same messages and pictures")
    add("--shard-size", type=at_least_one, default=4096, help="samples per shard (4096)")
    add("--min-image-size", type=at_least_one, default=4, help="pixels of the shorter side (4)")
    add(
        "--max-bad-fraction",
        type=float,
        default=MAX_BAD_FRACTION,
        help="stop if a larger share of rows is dropped (0.2)",
    )
    workers = min(_MOST_WORKERS, len(os.sched_getaffinity(0)))
    add(
        "--workers",
        type=at_least_one,
        default=workers,
        help="threads (default: cores, at most 8)",
    )
    add("--json", type=Path, help="SOURCE, as earlier versions called it")
    return parser


def _convert(arguments: argparse.Namespace) -> None:
    from gemoe_ds.data.sources.convert import Settings, convert
    from gemoe_ds.data.sources.formats.base import Columns

    columns = Columns(
        text=arguments.text_column,
        image=arguments.image_column,
        source=arguments.source_column,
        question=arguments.question,
    )
    convert(
        Settings(
            path=arguments.path or arguments.json,
            out=arguments.out,
            format=arguments.format,
            images=arguments.images,
            kinds=arguments.kinds,
            source=arguments.source,
            columns=columns,
            split=arguments.split,
            config=arguments.config,
            documents=arguments.documents,
            shard_size=arguments.shard_size,
            min_image_size=arguments.min_image_size,
            max_bad_fraction=arguments.max_bad_fraction,
            drop_duplicates=arguments.dedup == "exact",
            workers=arguments.workers,
        )
    )


if __name__ == "__main__":
    main()
