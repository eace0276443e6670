"""The command lines of all scripts: a mistake is one line, as everywhere."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from contextlib import nullcontext
from typing import Any, NoReturn

from gemoe_ds.errors import ConfigError, exit_on_error

_MOST_RANKS = 1_000_000


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ConfigErrors; a flag is written out, so that none is guessed."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **({"allow_abbrev": False} | options))
        self._exits = False

    def error(self, message: str) -> NoReturn:
        for action in self._actions:
            if action.nargs == "*":  # argparse's mixed parsing counts these as required
                message = message.removesuffix(f", {action.metavar}")
        with exit_on_error() if self._exits else nullcontext():
            raise ConfigError(f"{message}{self._hint(message)}; --help lists what is accepted")

    def _hint(self, message: str) -> str:
        """The way out for a flag that is none."""
        words = message.removeprefix("unrecognized arguments: ").split()
        if words == message.split() or not words or not words[0].startswith("--"):
            return ""
        flag, _, value = words[0].partition("=")
        if "." in flag:
            value = value or (words[1] if len(words) > 1 else "VALUE")
            return f" (an option of the recipe is written {flag.lstrip('-')}={value})"
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.7)
        if near:
            return f" (did you mean {near[0]}?)"
        takes_options = any(action.dest == "overrides" for action in self._actions)
        return " (an option of the recipe is written key.path=value)" if takes_options else ""

    def parse_or_exit(self, argv: list[str] | None = None) -> argparse.Namespace:
        """For scripts that parse before anything else; an `error` later on ends them too."""
        self._exits = True
        return self.parse_intermixed_args(sys.argv[1:] if argv is None else argv)


def at_least_one(text: str) -> int:
    """An argument that counts ranks, hosts or samples."""
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:18]) <= _MOST_RANKS:
        raise argparse.ArgumentTypeError(f"{text:.20} is not a number from 1 to {_MOST_RANKS}")
    return int(text)


def positive_number(text: str) -> float:
    """An argument that is a size."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text:.20} is not a number above 0")
    return value
