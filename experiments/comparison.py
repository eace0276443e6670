"""Every method on one backbone: the records of a grid of runs, side by side.

Shapes: S steps at which a run wrote metrics.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from gemoe_ds.analysis.record import EvalRecord, load_json
from gemoe_ds.analysis.results import BASELINE, Group, Results, Row, build_results
from gemoe_ds.errors import DataError
from gemoe_ds.registry import ConfigModel

METRICS = "metrics.jsonl"
TUNED = "top_k_tuned"
BUDGETED = "gemoe_budget_"  # and the budget: GeMoE trained for it
ABLATIONS = ("gemoe", "gemoe_mono_0", "gemoe_mono_0_5", "gemoe_mono_1_5", "gemoe_reversed")


class Curve(ConfigModel):
    """How the routers of one run trained."""

    method: str
    k: int | None
    seed: int
    step_S: tuple[int, ...]
    loss_S: tuple[float, ...]  # cross-entropy of the answers
    mean_k_S: tuple[float, ...]


class Comparison(ConfigModel):
    """Everything that the comparison's report says."""

    results: Results
    budgets: tuple[Row, ...]  # of trained routers that were held to a budget afterwards
    curves: tuple[Curve, ...]

    def of(self, *methods: str) -> list[Group]:
        return [group for group in self.results.groups if group.method in methods]

    @property
    def static(self) -> list[Group]:
        """The pretrained model at every k (the paper's Table 2)."""
        return self.of(BASELINE)

    @property
    def methods(self) -> list[Group]:
        """What was trained, ablations and budgets apart (Table 1)."""
        apart = (BASELINE, *ABLATIONS[1:])
        return [
            g
            for g in self.results.groups
            if g.method not in apart and not g.method.startswith(BUDGETED)
        ]

    @property
    def dynamic(self) -> list[Group]:
        """The methods in which k differs from token to token."""
        return [group for group in self.methods if group.is_adaptive]

    @property
    def budgeted(self) -> list[tuple[float, Group]]:
        """GeMoE trained for a budget, by budget."""
        named = [g for g in self.results.groups if g.method.startswith(BUDGETED)]
        by_budget = [(float(g.method.removeprefix(BUDGETED)), g) for g in named]
        return sorted(by_budget, key=lambda pair: pair[0])

    @property
    def budget_groups(self) -> list[Group]:
        """A trained router at a budget that it was held to afterwards, by budget."""
        keys = sorted({(row.method, row.budget_k or 0.0) for row in self.budgets})
        return [
            Group(m, None, tuple(r for r in self.budgets if (r.method, r.budget_k) == (m, budget)))
            for m, budget in keys
        ]

    def rivals(self) -> list[Group]:
        """Dynamic methods with GeMoE's mean k or less, best first, GeMoE among them."""
        (gemoe,) = self.of("gemoe")
        most = gemoe.mean(lambda r: r.mean_k)
        near = [g for g in self.dynamic if g.mean(lambda r: r.mean_k) <= most]
        return sorted(near, key=lambda g: -g.mean(lambda r: r.accuracy))


def compare(
    records: Sequence[EvalRecord], curves: Sequence[Curve], *, command: str, seconds: float
) -> Comparison:
    """Rows of all records, measured against the backbone's own k; DataError if they do not fit."""
    plain = [record for record in records if record.budget_k is None]
    results = build_results(plain, command=command, seconds=seconds)
    if not any(group.method == "gemoe" for group in results.groups):
        raise DataError("no evaluation of gemoe is among those given: evaluate it too")
    base = results.baseline.mean(lambda row: row.accuracy)
    budgets = tuple(
        Row(
            **record.model_dump(),
            retention=100 * record.accuracy / base,
            sparsity=100 * (1 - record.mean_k / record.backbone_k),
        )
        for record in records
        if record.budget_k is not None
    )
    return Comparison(results=results, budgets=budgets, curves=tuple(curves))


def read_curve(run: Path, record: EvalRecord) -> Curve:
    """The training curve of the run that a record evaluates, from its metrics.jsonl."""
    try:
        lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
        return Curve(
            method=record.method,
            k=record.k,
            seed=record.seed,
            step_S=tuple(line["step"] for line in lines),
            loss_S=tuple(line["loss/lm"] for line in lines),
            mean_k_S=tuple(line["mean_k"] for line in lines),
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{run / METRICS} is missing or damaged ({error}): train it again"
        ) from None


def mean_curve(curves: Sequence[Curve], values: str) -> tuple[tuple[int, ...], list[float]]:
    """Steps, and the mean over the seeds of `loss_S` or `mean_k_S`."""
    columns = zip(*(getattr(curve, values) for curve in curves), strict=True)
    return curves[0].step_S, [statistics.fmean(column) for column in columns]


def read_comparison(path: Path) -> Comparison:
    """Read comparison.json back; DataError, one line, if it is missing or damaged."""
    return load_json(path, Comparison, "make it again with python -m experiments.compare --report")
