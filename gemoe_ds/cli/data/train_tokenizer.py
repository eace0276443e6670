"""Train a tokenizer on converted samples and save it as a transformers folder."""

from __future__ import annotations

from pathlib import Path

from gemoe_ds.errors import exit_on_error
from gemoe_ds.parser import Parser


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="converted folders")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=1024,
        help="largest number of tokens, without the two role tokens",
    )
    arguments = parser.parse_or_exit(argv)
    with exit_on_error():
        from gemoe_ds.data.train_tokenizer import train_tokenizer

        train_tokenizer(arguments.data, arguments.vocab_size, arguments.out)


if __name__ == "__main__":
    main()
