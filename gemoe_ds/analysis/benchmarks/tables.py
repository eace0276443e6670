"""Tables 1, 2, 8 and 9 of the paper: what was measured, and the paper's own rows beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemoe_ds.analysis.benchmarks.collect import ModeRun
from gemoe_ds.analysis.benchmarks.columns import LANGUAGE, MORE, VISION, Column
from gemoe_ds.analysis.benchmarks.groups import Group, Measures, Model, models_of
from gemoe_ds.analysis.benchmarks.published import SOURCE, published_blocks, remarks
from gemoe_ds.analysis.benchmarks.results import (
    BenchmarkResults,
    Block,
    KindsOfTokens,
    Row,
    Source,
    Table,
)
from gemoe_ds.analysis.benchmarks.routing import Routing
from gemoe_ds.analysis.routing_sums import KINDS
from gemoe_ds.errors import DataError


@dataclass(frozen=True)
class Layout:
    """A table of the paper. `other_k`: rows for fixed k other than the backbone's own."""

    number: str
    title: str
    columns: tuple[Column, ...]
    other_k: bool = True


LAYOUTS = (
    Layout("1", "Methods that pick k for every token", VISION, other_k=False),
    Layout("2", "Fixed k", VISION),
    Layout("8", "Further vision-language benchmarks", MORE),
    Layout("9", "Language benchmarks", LANGUAGE),
)


def build_results(runs: Sequence[ModeRun], *, command: str) -> BenchmarkResults:
    """DataError where runs cannot be compared, or have no benchmark of the paper."""
    models = models_of(runs)
    tables = tuple(filter(None, (_table(layout, models) for layout in LAYOUTS)))
    if not tables:
        tasks = sorted({task for run in runs for task in run.tasks})
        raise DataError(
            f"none of the {len(tasks)} tasks ({', '.join(tasks[:5])}) is a benchmark of the paper: "
            "answer some of `--tasks paper-vision paper-more paper-language`"
        )
    return BenchmarkResults(
        command=command,
        tables=tables,
        kinds_of_tokens=tuple(_kinds_of_tokens(models)),
        sources=tuple(
            _source(group, run) for m in models for group in m.groups for run in group.runs
        ),
    )


def _table(layout: Layout, models: Sequence[Model]) -> Table | None:
    ours = [m for m in models if m.ran(layout.columns) and _groups(layout, m)]
    if not ours:
        return None
    blocks = [_block(layout, model) for model in ours]
    return Table(
        number=layout.number,
        title=layout.title,
        headings=tuple(h for column in layout.columns for h in column.headings),
        blocks=(*blocks, *published_blocks(layout.number)),
        notes=tuple(_notes(layout, ours, blocks)),
        choices=tuple(_choices(layout, ours)),
    )


def _groups(layout: Layout, model: Model) -> list[Group]:
    return [g for g in model.groups if layout.other_k or g.is_adaptive or g is model.baseline]


def _block(layout: Layout, model: Model) -> Block:
    measures = Measures(model, layout.columns)
    return Block(
        model=model.title,
        is_published=False,
        rows=tuple(_row(group, measures) for group in _groups(layout, model)),
        averaged=tuple(column.heading for column in measures.averaged),
        by_document=tuple(column.heading for column in measures.by_document),
    )


def _row(group: Group, measures: Measures) -> Row:
    routed: dict[str, Any] = {"activated_parameters": None, "mean_k": None, "sparsity": None}
    if all(measures.model.is_whole(group, column) for column in measures.columns):
        mode = group.first.mode
        active = [run.mode.activated_parameters(measures.mean_k_L(run)) for run in group.runs]
        mean_k = group.cell(lambda run: float(measures.mean_k_L(run).mean()))
        sparsity = group.cell(
            lambda run: 100 * (1 - float(measures.mean_k_L(run).mean()) / mode.backbone_k)
        )
        routed = {
            "activated_parameters": float(np.mean(active)),
            "mean_k": mean_k,
            "sparsity": sparsity,
        }
    return Row(
        label=group.label,
        num_seeds=len(group.runs),
        is_adaptive=group.is_adaptive,
        cells=measures.cells(group),
        average=measures.average(group),
        by_document=measures.average_by_document(group),
        retention=measures.retention(group),
        **routed,
    )


def _notes(layout: Layout, models: Sequence[Model], blocks: Sequence[Block]) -> Iterable[str]:
    yield (
        f"Rows *as published* are typed from {SOURCE}; their retention and sparsity follow from "
        "its averages and mean k. They are other runs, on data, prompts and shots that the paper "
        "does not name."
    )
    yield from remarks(layout.number)
    percents = [column.heading for column in layout.columns if not column.parts]
    for model, block in zip(models, blocks, strict=True):
        if set(block.averaged) != set(percents):
            yield (
                f"*Average* of {block.model} is over {', '.join(block.averaged) or 'nothing'} "
                f"({len(block.averaged)} of {len(percents)} benchmarks)."
            )
        if not model.baseline:
            k = model.groups[0].first.mode.backbone_k
            yield (
                f"*Retention* of {block.model} is unknown: the untouched model was not answered "
                f"with its own k. Run `gemoe benchmark answer` with --k {k}."
            )
        elif not any(row.retention for row in block.rows):
            yield (
                f"*Retention* of {block.model} is unknown: its own k has nothing right, or lacks a "
                "benchmark that other rows have."
            )
        yield from _limits(layout, model)
        yield from _gaps(layout, model)
    if any(column.parts for column in layout.columns):
        yield (
            "MME is points, not percent, so no average holds it. The paper does not say whether it "
            "prints perception, cognition or their sum; its number stands under the sum."
        )


def _limits(layout: Layout, model: Model) -> Iterable[str]:
    """Benchmarks of which only the first documents were asked are others."""
    limited = [
        column.heading
        for column in model.ran(layout.columns)
        if any(
            part.scores.choices.get("limit")
            for run in model.runs
            for part in run.columns.get(column.heading, [])
        )
    ]
    if limited:
        yield f"Only the first documents of {', '.join(limited)} were asked (`--limit`)."


def _gaps(layout: Layout, model: Model) -> Iterable[str]:
    """What is not there in some rows, and why."""
    for column in layout.columns:
        waiting = sorted(
            {f"{run.folder.name}/{task}" for run in model.runs for task in run.unscored
             if column.has(task)}
        )  # fmt: skip
        if waiting:
            yield (
                f"{column.heading} is answered and not scored ({', '.join(waiting[:3])}): run "
                "`gemoe benchmark score`."
            )
        ran = column in model.ran([column])
        partly = [group.label for group in model.groups if not model.is_whole(group, column)]
        if ran and partly:
            yield (
                f"{column.heading} is not whole in {', '.join(partly)}: a seed or a part, which "
                "other rows have, is not answered to its end, or not scored."
            )


def _choices(layout: Layout, models: Sequence[Model]) -> Iterable[str]:
    """By column, what the paper does not say."""
    said: dict[str, list[str]] = {}
    for model in models:
        for column in model.ran(layout.columns):
            parts = next(run for run in model.runs if column.heading in run.columns).columns
            scores = [part.scores for part in parts[column.heading]]
            tasks = scores[0].task
            if column.leaves:
                tasks = f"{column.task}, {len(scores)} of its {len(column.leaves)} parts,"
            number = sum(one.num_documents for one in scores)
            chosen = {
                f"; {name} {value}"
                for one in scores
                for name, value in one.choices.items()
                if value is not None
            }
            version = str(scores[0].version)  # of lmms_eval's tasks it is a word
            versioned = f" (version {version})" if version[:1].isdigit() else ""
            text = (
                f"**{column.heading}**: {tasks} of {scores[0].harness}{versioned}, {number:,} "
                f"documents, {' + '.join(column.metrics)}{''.join(sorted(chosen))}"
            )
            said.setdefault(text, []).append(model.title)
    for text, titles in said.items():
        yield f"{text} ({', '.join(titles)})." if len(models) > 1 else f"{text}."
    for model in models:
        dtypes = {run.mode.dtype for run in model.runs if run.mode.dtype}
        computed = f", computed in {' and '.join(sorted(dtypes))}" if dtypes else ""
        yield f"**{model.title}**: base model {model.base or 'with random weights'}{computed}."


def _kinds_of_tokens(models: Sequence[Model]) -> Iterable[KindsOfTokens]:
    """Of the methods that pick k: all others would say the same everywhere."""
    columns = [column for layout in LAYOUTS if layout.number != "2" for column in layout.columns]
    for model in models:
        for group in (group for group in model.groups if group.is_adaptive):
            routing = {
                column.heading: [run.routing[column.heading] for run in group.runs]
                for column in model.ran(columns)
                if model.is_whole(group, column)
            }
            for place, kind in enumerate(("all", *KINDS), -1):
                found = {h: _mean_k(sums, place) for h, sums in routing.items()}
                mean_k = {h: k for h, k in found.items() if k is not None}
                if mean_k:
                    yield KindsOfTokens(
                        model=model.title, label=group.label, kind=kind, mean_k=mean_k
                    )


def _mean_k(sums: Sequence[Routing], kind: int) -> float | None:
    """Over seeds; None where there are no tokens of the kind. -1: of all."""
    of_seeds = [one.mean_k_L if kind < 0 else one.mean_k_ML[kind] for one in sums]
    return None if np.isnan(of_seeds).any() else float(np.mean(of_seeds))


def _source(group: Group, run: ModeRun) -> Source:
    mode = run.mode
    names = ("base", "checkpoint", "seed", "command", "commit", "machine", "date")
    found = {name: getattr(mode, name) for name in names}
    return Source(label=group.label, folder=str(run.folder), **found)
