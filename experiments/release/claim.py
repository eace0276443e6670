"""A claim: words of a page, with the figures that a results file gives them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from experiments.release.results import Results

# What looks measured: a decimal, a share, a count of something, a size, a time, a rate.
_FIGURE = re.compile(
    r"(?<![\w.-])[+-]?(?:\d[\d,]*\.\d+|\.\d+|\d[\d,]* of (?:the )?\d[\d,]*"
    r"|\d[\d,]*(?: to \d[\d,]*)? ?(?:%|(?:GiB|MiB|GB|MB|kB|ms|s|min|minutes|seconds|hours|points"
    r"|times|tokens/s|samples/s|rows/s|GB/s)\b))(?![.\d]*\.\d)"
)
# What holds no figure of ours: fenced and indented blocks, code, the targets of links.
_CODE = re.compile(r"^```.*?^```$|^ {4}.*?$|`[^`\n]*`|\]\([^)]*\)|<!--.*?-->", re.M | re.S)


@dataclass(frozen=True)
class ByHand:
    """Where a figure comes from that stands in no results file."""

    command: str
    commit: str = ""
    machine: str = ""
    date: str = ""


@dataclass(frozen=True)
class Claim:
    """`words` as they stand on the page (white space aside), or what makes them of the results.

    Words that are given as they are were measured `by_hand`.
    """

    page: str
    words: Callable[[Results], str] | str
    by_hand: ByHand | None = None


@dataclass(frozen=True)
class Stated:
    """A claim with its figures, and the files that they come from."""

    page: str
    words: str
    files: tuple[str, ...]
    by_hand: ByHand | None


def state(claim: Claim, folder: Path) -> Stated:
    """The claim's words, from the results in `folder`; DataError where they have no such row."""
    results = Results(folder)
    words = claim.words if isinstance(claim.words, str) else claim.words(results)
    return Stated(claim.page, squeeze(words), tuple(results.read), claim.by_hand)


def squeeze(text: str) -> str:
    """Each run of white space as one space."""
    return " ".join(text.split())


def figures_without_claim(page: str, covered: Iterable[str]) -> list[str]:
    """What looks measured on a page, with its context, outside the words that are `covered`."""
    hidden = _CODE.sub(lambda found: re.sub(r"\S", "\0", found[0]), page)
    text, shown = squeeze(page), squeeze(hidden)
    known = [span for words in covered for span in _spans(text, squeeze(words))]
    return [
        f"{found[0]} in: ...{text[max(0, found.start() - 60) : found.end() + 30]}..."
        for found in _FIGURE.finditer(shown)
        if not any(low <= found.start() and found.end() <= high for low, high in known)
    ]


def _spans(text: str, words: str) -> list[tuple[int, int]]:
    return [(found.start(), found.end()) for found in re.finditer(re.escape(words), text)]
