"""What a folder of samples holds: counts, tokens, picture sizes, cut answers, duplicates, sources.

Prints them, and writes card.json, figures (PNG) and card.html, one page that needs no other file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from gemoe_ds.errors import exit_on_error
from gemoe_ds.parser import Parser

if TYPE_CHECKING:
    from gemoe_ds.data.card import Tokens
    from gemoe_ds.data.sample import SampleFolder


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("data", type=Path, metavar="DIR", help="a converted folder")
    parser.add_argument("--recipe", help="count tokens as a run of this recipe will")
    parser.add_argument("--tokenizer", type=Path, help="or the texts alone, by this tokenizer")
    parser.add_argument("--out", type=Path, help="folder to write (default: DIR/card)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="of the recipe")
    flags = parser.parse_or_exit(argv)
    if flags.recipe and flags.tokenizer:
        parser.error("give --recipe or --tokenizer, not both")
    if flags.overrides and not flags.recipe:
        parser.error(f"{flags.overrides[0]}: an option of a recipe; give --recipe")
    with exit_on_error():
        _card(flags)


def _card(flags: argparse.Namespace) -> None:
    from gemoe_ds.analysis import data_card
    from gemoe_ds.data.card import card_of
    from gemoe_ds.data.sample import open_samples
    from gemoe_ds.files import write_text, writing_into

    samples = open_samples(flags.data)
    tokens = None
    if flags.recipe:
        tokens = _by_recipe(samples, flags.recipe, flags.overrides)
    elif flags.tokenizer:
        tokens = _by_tokenizer(samples, flags.tokenizer)
    card = card_of(samples, tokens)
    out = flags.out or flags.data / "card"
    with writing_into(out):
        write_text(out / "card.json", json.dumps(card, indent=1))
        figures = data_card.write_figures(card, out)
        write_text(out / "card.html", data_card.as_html(card, out, figures))
    print(data_card.as_text(card), end="")
    print(f"{out}/card.html: the same with figures")


def _by_recipe(samples: SampleFolder, recipe: str, overrides: list[str]) -> Tokens:
    """Template, pictures and cuts as in training; the lengths are kept for the run."""
    from gemoe_ds.config.load import load_config
    from gemoe_ds.data.card import Tokens
    from gemoe_ds.data.lengths import known_lengths
    from gemoe_ds.train.assemble import meta_collator
    from gemoe_ds.train.checks.samples import cut_of

    config = load_config(recipe, overrides)
    lengths, _ = known_lengths(samples, meta_collator(config))
    assert lengths is not None  # nobody stops it
    name = f"recipe {Path(recipe).stem}"
    return Tokens.of_lengths(name, lengths, cut_of(lengths, config), config.data.max_length)


def _by_tokenizer(samples: SampleFolder, folder: Path) -> Tokens:
    from gemoe_ds.data.card import text_tokens
    from gemoe_ds.models.tokenizer import load_tokenizer

    return text_tokens(samples, load_tokenizer(folder), f"texts alone, tokenizer {folder.name}")


if __name__ == "__main__":
    main()
