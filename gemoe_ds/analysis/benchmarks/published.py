"""The paper's own rows, as published.json has them."""

from __future__ import annotations

import json
from pathlib import Path

from gemoe_ds.analysis.benchmarks.columns import COLUMNS
from gemoe_ds.analysis.benchmarks.results import Block, Cell, Row

_FILE = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
SOURCE: str = _FILE["source"]
_HEADINGS = {column.heading: column.headings[-1] for column in COLUMNS}


def published_blocks(number: str) -> tuple[Block, ...]:
    """Retention and sparsity are not in the paper: they follow from its averages and mean k."""
    return tuple(
        Block(
            model=block["model"],
            is_published=True,
            rows=tuple(_row(row, block) for row in block["rows"]),
        )
        for block in _FILE["tables"][number]
    )


def _row(row: dict, block: dict) -> Row:
    headings = [_HEADINGS[name] for name in block["columns"]]
    base, average, mean_k = block["rows"][0]["average"], row["average"], row["mean_k"]
    return Row(
        label=row["method"],
        is_adaptive=not row["method"].removeprefix("Top-").isdigit(),
        is_published=True,
        activated_parameters=row["billions"] and row["billions"] * 1e9,
        mean_k=Cell(value=mean_k),
        cells={h: Cell(value=v) for h, v in zip(headings, row["scores"], strict=True)},
        average=average and Cell(value=average),
        retention=average and Cell(value=100 * average / base),
        sparsity=Cell(value=100 * (1 - mean_k / block["backbone_k"])),
    )


def remarks(number: str) -> list[str]:
    """Where an average that the paper prints is not the mean of the row."""
    return [
        f"The paper prints {row.average.value:.2f} as the average of {row.label} on {block.model}; "
        f"the mean of the row is {mean:.2f}."
        for block in published_blocks(number)
        for row in block.rows
        if row.average
        and abs((mean := sum(c.value for c in row.cells.values()) / len(row.cells))
                - row.average.value) > 0.0101
    ]  # fmt: skip
