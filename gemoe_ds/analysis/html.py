"""Tables, figures and lists -> one HTML page that needs nothing else, and no network."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from gemoe_ds.analysis.report import NONE

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Td:
    """A cell: its text, what it is sorted by, and what a pointer over it shows."""

    text: str
    sorts_as: float | None = None
    title: str = ""

    def __str__(self) -> str:
        number = "" if self.sorts_as is None else f' data-v="{self.sorts_as:.6g}"'
        title = f' title="{escape(self.title)}"' if self.title else ""
        text = ' class="text"' if self.sorts_as is None and self.text != NONE else ""
        return f"<td{text}{number}{title}>{inline(self.text)}</td>"


def page(title: str, body: Iterable[str]) -> str:
    """The whole file; headings of its tables sort them."""
    style, script = ((_HERE / name).read_text("utf-8") for name in ("page.css", "page.js"))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        f"</title>\n<style>\n{style}</style></head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>\n{script}</script>\n</body></html>\n"
    )


def table(
    heads: Sequence[str], rows: Sequence[tuple[str, Sequence[Td]]], texts: Sequence[str] = ()
) -> str:
    """`rows`: the class of each and its cells; `texts`: the heads of columns that are text."""
    head = "".join(
        f"<th{' class=text' if name in texts else ''}>{escape(name)}</th>" for name in heads
    )
    lines = [f'<tr class="{kind.strip()}">{"".join(map(str, cells))}</tr>' for kind, cells in rows]
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>'
        + "\n".join(lines)
        + "</tbody></table></div>"
    )


def text_table(cells: list[list[str]], texts: Sequence[str] = ()) -> str:
    """A table of plain cells; what begins with a number is sorted by it."""
    lines = [("", [Td(text, _leading_number(text)) for text in line]) for line in cells[1:]]
    return table(cells[0], lines, texts)


def figure(file: Path, caption: str) -> str:
    """A picture, within the page."""
    data = base64.b64encode(file.read_bytes()).decode()
    image = f'<img alt="{escape(file.name)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{inline(caption)}</figcaption></figure>"


def notes(lines: Iterable[str]) -> str:
    return '<ul class="notes">' + "".join(f"<li>{inline(line)}</li>" for line in lines) + "</ul>"


def inline(text: str) -> str:
    """The little Markdown that the reports have."""
    text = escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)
    return re.sub(r"(?<![\w*])\*([^*]+)\*(?![\w*])", r"<em>\1</em>", text)


def _leading_number(text: str) -> float | None:
    found = re.match(r"[+-]?\d[\d,]*(\.\d+)?(?=$| )", text)
    return float(found[0].replace(",", "")) if found else None
