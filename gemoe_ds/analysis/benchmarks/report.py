"""results.json -> report.md, a CSV file a table, and the cells that the HTML shows too."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from gemoe_ds.analysis.benchmarks.results import BenchmarkResults, Block, Cell, Row, Table
from gemoe_ds.analysis.report import NONE, PLUS_MINUS
from gemoe_ds.analysis.tables import aligned, markdown

PUBLISHED = "as published"
LEGEND = (
    "*N*: parameters that an average token uses, the backbone's, without predictors. *Mean k*: "
    "experts a token, over layers and over the benchmarks of a table, each of which counts the "
    "same.",
    "*Average*: of the benchmarks of a table, percent. *Retention*: average in percent of that of "
    "the untouched model with its own k. *Sparsity*: 100 x (1 - mean k / that k).",
    f"-: not run, or not published. {PLUS_MINUS}: sample standard deviation over seeds.",
    "Intervals are 95 %, by document: all methods meet the same resamples of documents, though "
    "some share a picture. Where there are several seeds, they count too. A benchmark whose score "
    "is no mean over documents has none.",
)


def render_report(results: BenchmarkResults) -> str:
    """The Markdown report; figures are named as files in `figures/`."""
    parts = ["# Benchmarks", *headlines(results), _bullets(LEGEND)]
    for table in results.tables:
        parts += [f"## Table {table.number}: {table.title}", markdown(table_cells(table))]
        for title, cells in difference_tables(table):
            parts += [title, markdown(cells)]
        parts += [_bullets(table.notes), "Chosen here, because the paper does not say:"]
        parts.append(_bullets(table.choices))
    if results.kinds_of_tokens:
        parts += ["## Experts a token, by benchmark", markdown(kinds_table(results))]
    if results.figures:
        parts.append("## Figures")
        for entry in results.figures:
            name = entry.file.rsplit(".", 1)[0].replace("_", " ")
            parts += [f"![{name}](figures/{entry.file})", f"*{entry.caption}*"]
    parts += ["## How it was run", f"Report: `{results.command}`", markdown(sources_table(results))]
    return "\n\n".join(parts) + "\n"


def terminal_tables(results: BenchmarkResults, width: int | None = None) -> str:
    """The tables as aligned text; without the benchmarks where one would be wider than `width`."""
    lines: list[str] = []
    for table in results.tables:
        cells = [[_plain(cell) for cell in line] for line in table_cells(table)]
        if width is not None and max(map(len, aligned(cells))) > width:
            kept = [0, 1, 2, *range(3 + len(table.headings), len(cells[0]))]
            cells = [[line[column] for column in kept] for line in cells]
        lines += [f"Table {table.number}: {table.title}", *aligned(cells), ""]
    return "\n".join(lines)


def _plain(cell: str) -> str:
    """For a terminal, which may not know the sign."""
    return cell.replace("*", "").replace(PLUS_MINUS, "+-")


def headlines(results: BenchmarkResults) -> Iterable[str]:
    """A sentence for every method that picks k."""
    for table in results.tables:
        for block in (block for block in table.blocks if not block.is_published):
            for row in block.rows:
                if table.number != "1" and row.is_adaptive and row.retention and row.sparsity:
                    seeds = f"; mean of {row.num_seeds} seeds" if row.num_seeds > 1 else ""
                    yield (
                        f"**{row.label} keeps {row.retention.value:.2f} %{_between(row.retention)} "
                        f"of the average at {row.sparsity.value:.1f} % expert sparsity** "
                        f"({block.model}; {', '.join(block.averaged)}{seeds})."
                    )


def _between(cell: Cell) -> str:
    return "" if cell.interval is None else f" ({cell.interval[0]:.2f} to {cell.interval[1]:.2f})"


def table_cells(table: Table) -> list[list[str]]:
    """A table of text, as the paper lays it out: a line that names the model, then its rows."""
    heads = ["Method", "N", "Mean k", *table.headings, "Average", "Retention %", "Sparsity %"]
    lines = [heads]
    for block in table.blocks:
        lines.append([_title(block), *[""] * (len(heads) - 1)])
        lines += [[row_label(row), *row_cells(row, table)] for row in block.rows]
    return lines


def _title(block: Block) -> str:
    return f"*{block.model}, {PUBLISHED}*" if block.is_published else f"*{block.model}*"


def row_label(row: Row) -> str:
    seeds = f" ({row.num_seeds} seeds)" if row.num_seeds > 1 else ""
    published = f", {PUBLISHED}" if row.is_published else ""
    return f"**{row.label}**{seeds}{published}" if row.is_adaptive else row.label + published


def row_cells(row: Row, table: Table) -> list[str]:
    """What stands right of the method."""
    scores = [number(row.cells.get(heading)) for heading in table.headings]
    return [
        _parameters(row.activated_parameters),
        number(row.mean_k),
        *scores,
        number(row.average),
        number(row.retention),
        number(row.sparsity, 1),
    ]


def number(cell: Cell | None, decimals: int = 2) -> str:
    """A mean, with the standard deviation over seeds if there are several."""
    if cell is None:
        return NONE
    spread = "" if cell.sd is None else f" {PLUS_MINUS} {cell.sd:.{decimals}f}"
    return f"{cell.value:z.{decimals}f}{spread}"


def _parameters(count: float | None) -> str:
    if count is None:
        return NONE
    return f"{count / 1e9:.2f}B" if count >= 1e8 else f"{count / 1e6:.3g}M"


def difference_tables(table: Table) -> Iterable[tuple[str, list[list[str]]]]:
    """For every model of ours: what it is, and rows against the backbone's own k."""
    for block in table.blocks:
        rows = [row for row in block.rows if any(c.difference for c in row.cells.values())]
        if not rows:
            continue
        lines = [["Method", *block.by_document, "Mean"]]
        for row in rows:
            cells = [row.cells.get(heading) for heading in block.by_document]
            lines.append([row_label(row), *map(_difference, [*cells, row.by_document])])
        title = f"{block.model}: points more than the untouched model with its own k."
        yield f"{title} *Mean*: of the columns shown.", lines


def _difference(cell: Cell | None) -> str:
    if cell is None or cell.difference is None:
        return NONE
    low, high = cell.difference.interval
    return f"{cell.difference.value:+z.2f} ({low:z.2f} to {high:z.2f})"


def kinds_table(results: BenchmarkResults) -> list[list[str]]:
    """Mean k, method by method and kind by kind of token."""
    columns = list(dict.fromkeys(h for row in results.kinds_of_tokens for h in row.mean_k))
    lines = [["Model", "Method", "Tokens", *columns]]
    for row in results.kinds_of_tokens:
        cells = [f"{row.mean_k[h]:.2f}" if h in row.mean_k else NONE for h in columns]
        lines.append([row.model, row.label, row.kind, *cells])
    return lines


def sources_table(results: BenchmarkResults) -> list[list[str]]:
    lines = [["Row", "Seed", "Folder", "Trained", "Commit", "Machine", "Date", "Command"]]
    for one in results.sources:
        known = [one.checkpoint or NONE, one.commit or "unknown", one.machine, one.date]
        lines.append([one.label, str(one.seed), one.folder, *known, f"`{one.command}`"])
    return lines


def table_csv(table: Table) -> str:
    """A line a row; every number with what is known of it, columns that nobody fills left out."""
    lines = [_csv_line(table, block, row) for block in table.blocks for row in block.rows]
    heads = list(dict.fromkeys(name for line in lines for name in line))
    filled = [h for h in heads if any(line.get(h) not in (None, "") for line in lines)]
    text = io.StringIO()
    writer = csv.DictWriter(text, filled, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _csv_line(table: Table, block: Block, row: Row) -> dict[str, object]:
    line: dict[str, object] = {
        "model": block.model,
        "method": row.label,
        "as_published": int(row.is_published),
        "seeds": row.num_seeds if not row.is_published else "",
        "activated_parameters": round(row.activated_parameters or 0) or "",
    }
    named: list[tuple[str, Cell | None]] = [
        ("mean_k", row.mean_k),
        *((heading, row.cells.get(heading)) for heading in table.headings),
        ("average", row.average),
        ("mean_by_document", row.by_document),
        ("retention", row.retention),
        ("sparsity", row.sparsity),
    ]
    for name, cell in named:
        for suffix, value in zip(_OF_CELL, _numbers(cell), strict=True):
            line[name + suffix] = "" if value is None else round(value, 6)
    return line


_OF_CELL = ("", " sd", " low", " high", " difference", " difference low", " difference high")


def _numbers(cell: Cell | None) -> Iterable[float | None]:
    if cell is None:
        return [None] * len(_OF_CELL)
    apart = cell.difference
    differs = (apart.value, *apart.interval) if apart else (None,) * 3
    return [cell.value, cell.sd, *(cell.interval or (None, None)), *differs]


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
