"""LLaVA-format JSON + image folder -> checked samples."""

from __future__ import annotations

from pathlib import Path

from gemoe_ds.errors import exit_on_error
from gemoe_ds.parser import Parser


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="LLaVA-format JSON")
    parser.add_argument("--images", type=Path, required=True, help="folder of the image files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--kinds", type=Path, help='JSON: {"<id>": [kind of each question, ...]}')
    parser.add_argument("--shard-size", type=int, default=4096, help="samples per shard (4096)")
    parser.add_argument(
        "--min-image-size", type=int, default=4, help="pixels of the shorter side (4)"
    )
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.2,
        help="stop if a larger share of rows is dropped (0.2)",
    )
    parser.add_argument("--workers", type=int, default=2, help="threads that decode images")
    arguments = parser.parse_or_exit(argv)
    for option in ("shard_size", "min_image_size", "workers"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option.replace('_', '-')} must be at least 1")
    if not 0 <= arguments.max_bad_fraction <= 1:
        parser.error("--max-bad-fraction must be from 0 to 1")
    with exit_on_error():
        from gemoe_ds.data.sources.llava import convert

        convert(arguments)


if __name__ == "__main__":
    main()
