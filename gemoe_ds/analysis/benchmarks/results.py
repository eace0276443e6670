"""results.json: the paper's tables, filled with what was measured, and its own rows beside it."""

from __future__ import annotations

from gemoe_ds.analysis.results import FigureFile
from gemoe_ds.registry import ConfigModel

Interval = tuple[float, float]


class Difference(ConfigModel):
    """To the untouched model at the backbone's own k. The interval is 95 %, by documents."""

    value: float
    interval: Interval


class Cell(ConfigModel):
    """A number of the table: a mean over seeds."""

    value: float
    sd: float | None = None  # over seeds, where there are several
    interval: Interval | None = None  # 95 %, by documents and seeds
    difference: Difference | None = None


class Row(ConfigModel):
    """One method of a table. What is not there was not run, or not published."""

    label: str
    num_seeds: int = 1
    is_adaptive: bool = False
    is_published: bool = False
    activated_parameters: float | None = None  # of an average token
    mean_k: Cell | None = None
    cells: dict[str, Cell]  # by heading
    average: Cell | None = None
    by_document: Cell | None = None  # the mean over the columns that are means over documents
    retention: Cell | None = None  # percent of the average of the backbone's own k
    sparsity: Cell | None = None  # percent


class Block(ConfigModel):
    """Rows that are measured against each other: one model, ours or as published."""

    model: str
    is_published: bool
    rows: tuple[Row, ...]
    averaged: tuple[str, ...] = ()  # the columns of the average
    by_document: tuple[str, ...] = ()  # and those of them with intervals


class Table(ConfigModel):
    """A table of the paper."""

    number: str
    title: str
    headings: tuple[str, ...]
    blocks: tuple[Block, ...]
    notes: tuple[str, ...]
    choices: tuple[str, ...]  # what the paper does not say, and this run chose


class KindsOfTokens(ConfigModel):
    """The mean k of a method on every benchmark, by kind of token."""

    model: str
    label: str
    kind: str  # all, image, prompt, written
    mean_k: dict[str, float]  # by column


class Source(ConfigModel):
    """How and where one way to route was answered."""

    label: str
    folder: str
    base: str | None = None
    checkpoint: str | None = None
    seed: int
    command: str
    commit: str | None = None
    machine: str
    date: str


class BenchmarkResults(ConfigModel):
    """Everything that the report says."""

    command: str
    tables: tuple[Table, ...]
    kinds_of_tokens: tuple[KindsOfTokens, ...]
    sources: tuple[Source, ...]
    figures: tuple[FigureFile, ...] = ()
