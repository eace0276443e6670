"""card.json of a folder of samples -> text, PNG and one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from gemoe_ds.analysis import html
from gemoe_ds.analysis.drawing import DASHED, FAINT, IMAGE, INK, STYLE, TEXT, legend_above
from gemoe_ds.analysis.results import FigureFile
from gemoe_ds.analysis.tables import aligned

Card = dict[str, Any]
Draw = Callable[[Card], Figure | None]
FIGURES: dict[str, tuple[str, Draw]] = {}  # name -> caption and what draws it
_HEADS = {
    "samples": "Samples",
    "pictures": "Pictures",
    "answers": "Answers",
    "characters": "Characters",
    "tokens": "Tokens",
    "image_tokens": "of images",
    "targets": "Targets",
    "cut_answers": "Cut answers",
    "left_out": "Left out",
}


def figure(name: str, caption: str) -> Callable[[Draw], Draw]:
    """A new figure is one function under this: None where a card has nothing to show."""

    def register(draw: Draw) -> Draw:
        FIGURES[name] = (caption, draw)
        return draw

    return register


def as_text(card: Card) -> str:
    """For a terminal."""
    title = f"{card['folder']}, made from {card['made_from']}"
    return "\n".join([title, *facts(card), "", *aligned(sources(card))]) + "\n"


def as_html(card: Card, folder: Path, figures: list[FigureFile]) -> str:
    """`folder`: where the files of the figures are."""
    body = [f"<h1>{escape(Path(card['folder']).name)}</h1>"]
    body.append(f"<p>made from <code>{escape(card['made_from'])}</code></p>")
    body += [
        html.notes(facts(card)),
        "<h2>Sources</h2>",
        html.text_table(sources(card), ["Source"]),
    ]
    if card["dropped"]:
        cells = [["Rows", "Dropped for", "First"]]
        cells += [[f"{d['rows']:,}", d["group"], d["first"]] for d in card["dropped"]]
        body += ["<h2>Dropped when it was converted</h2>", html.text_table(cells, cells[0][1:])]
    body += [html.figure(folder / entry.file, entry.caption) for entry in figures]
    return html.page(f"Data card: {Path(card['folder']).name}", body)


def write_figures(card: Card, folder: Path) -> list[FigureFile]:
    """As PNG."""
    written = []
    with rc_context(STYLE):
        for name, (caption, draw) in FIGURES.items():
            if (drawn := draw(card)) is not None:
                drawn.savefig(folder / f"{name}.png")
                written.append(FigureFile(file=f"{name}.png", caption=caption))
    return written


def facts(card: Card) -> Iterator[str]:
    """The counts of the whole, a line each."""
    roles, pictures, tokens = card["messages"], card["pictures"], card["tokens"]
    yield f"{card['samples']:,} samples, {card['megabytes']:,} MB, schema {card['schema']}"
    said = ", ".join(f"{count:,} of {role}" for role, count in sorted(roles.items()))
    unlearned = f"; {n:,} answers are not learned" if (n := card["answers_not_learned"]) else ""
    yield f"messages: {said}{unlearned}"
    if pictures["shown"]:
        line = f"pictures: {pictures['shown']:,} shown, {pictures['stored']:,} stored"
        if pictures["width"]:
            wide, high = pictures["width"], pictures["height"]
            line += (
                f"; {wide['median']:.0f} x {high['median']:.0f} (medians), from "
                f"{wide['min']} x {high['min']} to {wide['max']} x {high['max']}"
            )
        yield line
    if tokens:
        yield from _token_facts(tokens)
    again = card["duplicates"]
    if again["samples"]:
        named = ", ".join(again["first"])
        yield f"duplicates: {again['samples']:,} samples (first: {named}); --dedup exact drops them"
    else:
        yield "duplicates: none"
    yield f"rows dropped when it was converted: {card['rows_dropped']:,}"


def _token_facts(tokens: dict[str, Any]) -> Iterator[str]:
    spread, total = tokens["a_sample"], max(tokens["total"], 1)
    yield (
        f"tokens ({tokens['by']}): {tokens['total']:,}, of which {tokens['of_images'] / total:.0%} "
        f"of images and {tokens['targets'] / total:.0%} learned; a sample has "
        f"{spread['median']:.0f} (median), {spread['p5']:.0f} to {spread['p95']:.0f} (90 %), "
        f"{spread['max']:,} at most"
    )
    if "cut_answers" in tokens:
        yield (
            f"data.max_length={tokens['max_length']}: cuts {tokens['cut_answers']:,} answers of "
            f"{tokens['cut_samples']:,} samples, leaves out {tokens['left_out']:,} samples"
        )


def sources(card: Card) -> list[list[str]]:
    """A table of texts: a source a row, and their sum."""
    rows = card["sources"]
    columns = [key for key in _HEADS if key in rows[0]]
    cells = [["Source", *(_HEADS[key] for key in columns)]]
    for row in rows:
        cells.append([row["source"] or "(no name)", *(f"{row[key]:,}" for key in columns)])
    if len(rows) > 1:
        cells.append(["all", *(f"{sum(row[key] for row in rows):,}" for key in columns)])
    return cells


@figure("lengths", "Samples by their number of tokens; the line is `data.max_length`.")
def lengths(card: Card) -> Figure | None:
    if not card["tokens"]:
        return None
    found = card["tokens"]["histogram"]
    drawn = Figure(figsize=(6.0, 3.2), layout="constrained")
    axes = drawn.subplots()
    axes.stairs(found["counts"], found["edges"], fill=True, color=TEXT)
    axes.set(xscale="log", xlabel="tokens of a sample", ylabel="samples")
    if limit := card["tokens"]["max_length"]:
        axes.axvline(limit, color=INK, linestyle=DASHED, linewidth=1.2)
    return drawn


@figure(
    "pictures",
    "Widths and heights of the pictures as shown, some of many; on the line they are square.",
)
def picture_sizes(card: Card) -> Figure | None:
    sizes = np.array(card["pictures"]["sizes"])
    if not len(sizes):
        return None
    drawn = Figure(figsize=(4.4, 4.0), layout="constrained")
    axes = drawn.subplots()
    ends = [sizes.min() * 0.9, sizes.max() * 1.1]
    axes.plot(ends, ends, color=FAINT, linewidth=1.0)
    axes.plot(sizes[:, 0], sizes[:, 1], ".", color=IMAGE, markersize=3, alpha=0.5)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="width", ylabel="height")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:.0f}")
        axis.set_minor_locator(NullLocator())
    return drawn


@figure("turns", "Samples by their learned answers, and by their pictures.")
def turns(card: Card) -> Figure | None:
    drawn = Figure(figsize=(6.0, 2.8), layout="constrained")
    named = (
        ("answers_a_sample", "learned answers", TEXT),
        ("pictures_a_sample", "pictures", IMAGE),
    )
    for axes, (key, label, colour) in zip(drawn.subplots(1, 2), named, strict=True):
        axes.bar(card[key]["number"], card[key]["samples"], color=colour)
        axes.set(xlabel=f"{label} of a sample", ylabel="samples")
        axes.xaxis.get_major_locator().set_params(integer=True)
    return drawn


@figure("sources", "Where the samples are from: shares of samples and, if counted, of tokens.")
def shares(card: Card) -> Figure | None:
    rows = card["sources"]
    if len(rows) < 2:
        return None
    drawn = Figure(figsize=(6.0, 0.8 + 0.32 * len(rows)), layout="constrained")
    axes, place = drawn.subplots(), np.arange(len(rows))
    keys = [key for key in ("samples", "tokens") if key in rows[0]]
    for number, (key, colour) in enumerate(zip(keys, (INK, TEXT), strict=False)):
        total = max(sum(row[key] for row in rows), 1)
        values = [100 * row[key] / total for row in rows]
        axes.barh(
            place + 0.4 * number / len(keys), values, 0.4 / len(keys), color=colour, label=key
        )
    axes.set_yticks(place, [row["source"] or "(no name)" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("% of all")
    legend_above(drawn, axes)
    return drawn
