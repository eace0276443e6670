"""results.json, figures and answers -> one HTML page that needs nothing else, and no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from gemoe_ds.analysis import html
from gemoe_ds.analysis.benchmarks import report
from gemoe_ds.analysis.benchmarks.collect import ModeRun
from gemoe_ds.analysis.benchmarks.columns import COLUMNS
from gemoe_ds.analysis.benchmarks.files import ShownAnswer
from gemoe_ds.analysis.benchmarks.groups import Group
from gemoe_ds.analysis.benchmarks.results import BenchmarkResults, Block, Cell, Row, Table
from gemoe_ds.analysis.html import Td

_LIGHT, _DARK = (255, 247, 236), (213, 94, 0)  # of few experts, of many


def render_html(
    results: BenchmarkResults, figures: Path, answers: Sequence[tuple[Group, ModeRun]]
) -> str:
    """`figures`: the folder of their files. `answers`: what may be shown word by word."""
    body = ["<h1>Benchmarks</h1>"]
    links = [(f"table-{table.number}", f"Table {table.number}") for table in results.tables]
    links += [("figures", "Figures")] if results.figures else []
    shown = list(_answers(answers))
    links += [("answers", "Answers")] if shown else []
    links.append(("sources", "How it was run"))
    body.append("<nav>" + "".join(f'<a href="#{i}">{name}</a>' for i, name in links) + "</nav>")
    body += [f"<p>{html.inline(line)}</p>" for line in report.headlines(results)]
    body += ["<p>A click on a heading sorts a table.</p>", html.notes(report.LEGEND)]
    for table in results.tables:
        body += _table_section(table)
    if results.kinds_of_tokens:
        body += [
            "<h2>Experts a token, by benchmark</h2>",
            html.text_table(report.kinds_table(results), _TEXTS),
        ]
    if results.figures:
        body.append('<h2 id="figures">Figures</h2>')
        for entry in results.figures:
            body.append(html.figure(figures / entry.file, entry.caption))
    if shown:
        body += ['<h2 id="answers">Answers, word by word</h2>', *shown]
    body += [
        '<h2 id="sources">How it was run</h2>',
        f"<p><code>{escape(results.command)}</code></p>",
    ]
    body.append(html.text_table(report.sources_table(results), _TEXTS))
    return html.page("Benchmarks", body)


def _table_section(table: Table) -> Iterable[str]:
    heads = ["Model", "Method", "N", "Mean k", *table.headings]
    heads += ["Average", "Retention %", "Sparsity %"]
    rows = [
        (" published" * row.is_published + " adaptive" * row.is_adaptive, _cells(block, row, table))
        for block in table.blocks
        for row in block.rows
    ]
    yield f'<h2 id="table-{table.number}">Table {table.number}: {escape(table.title)}</h2>'
    yield html.table(heads, rows, _TEXTS)
    for title, cells in report.difference_tables(table):
        yield f"<p>{html.inline(title)}</p>{html.text_table(cells, _TEXTS)}"
    yield html.notes(table.notes)
    yield '<p class="notes">Chosen here, because the paper does not say:</p>'
    yield html.notes(table.choices)


def _cells(block: Block, row: Row, table: Table) -> list[Td]:
    cells = [row.mean_k, *(row.cells.get(heading) for heading in table.headings)]
    cells += [row.average, row.retention, row.sparsity]
    texts = report.row_cells(row, table)
    first = [Td(block.model), Td(report.row_label(row)), Td(texts[0], row.activated_parameters)]
    return first + [
        Td(text, None if cell is None else cell.value, _pointed_at(cell))
        for text, cell in zip(texts[1:], cells, strict=True)
    ]


def _pointed_at(cell: Cell | None) -> str:
    """The interval of a cell, and its difference to the backbone's own k."""
    if cell is None or cell.interval is None:
        return ""
    says = f"95 %: {cell.interval[0]:.2f} to {cell.interval[1]:.2f}"
    if apart := cell.difference:
        low, high = apart.interval
        says += f"; minus own k: {apart.value:+.2f} ({low:.2f} to {high:.2f})"
    return says


_TEXTS = "Model Method Tokens Row Folder Trained Commit Machine Date Command".split()


def _answers(answers: Sequence[tuple[Group, ModeRun]]) -> Iterable[str]:
    """By method and benchmark; colours from 0 experts to the most that any word took."""
    every = [
        (group, column.heading, part)
        for group, run in answers
        for column in COLUMNS
        for part in run.columns.get(column.heading, [])
        if part.shown
    ]
    if not every:
        return
    every_k = [k for *_, part in every for one in part.shown for _, k in one.tokens]
    most = max(every_k, default=0) or 1.0
    ends = f"linear-gradient(to right, {_colour(0, most)}, {_colour(most, most)})"
    yield (
        "<p>The colour of a word says how many experts it took to write it, mean over layers: 0 "
        f'<span class="scale" style="background: {ends}"></span> {most:.2f}. A pointer over a word '
        "shows its number.</p>"
    )
    for group, heading, part in every:
        scores = dict(zip(part.documents.doc_id_N.tolist(), part.documents.right_N, strict=True))
        shown = [_answer(one, scores.get(one.doc_id), most) for one in part.shown]
        title = f"{heading} ({part.folder.name}), {group.label}: {len(shown)} answers"
        yield f"<details><summary>{escape(title)}</summary>{''.join(shown)}</details>"


def _answer(answer: ShownAnswer, score: float | None, most: float) -> str:
    words = "".join(
        f'<span style="background: {_colour(k, most)}" title="k {k:.2f}">{escape(text)}</span>'
        for text, k in answer.tokens
    )
    return (
        f'<div class="answer"><div class="question">{escape(answer.question)}</div>'
        f'<div class="written">{words or "<i>nothing</i>"}</div>'
        f"<div>document {answer.doc_id}, score {report.NONE if score is None else f'{score:g}'}"
        "</div></div>"
    )


def _colour(k: float, most: float) -> str:
    share = min(max(k / most, 0.0), 1.0) * 0.85
    mixed = (round(a + share * (b - a)) for a, b in zip(_LIGHT, _DARK, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)
