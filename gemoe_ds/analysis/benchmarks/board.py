"""The rows of the tables on TensorBoard: hyperparameters say what routes, metrics are scores."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gemoe_ds.analysis.benchmarks.collect import ModeRun
from gemoe_ds.analysis.benchmarks.columns import COLUMNS
from gemoe_ds.analysis.benchmarks.groups import Model

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def write_rows(models: Sequence[Model], board: SummaryWriter) -> None:
    """A run of TensorBoard for each way to route and seed."""
    for number, model in enumerate(models, 1):
        for group in model.groups:
            for run in group.runs:
                name = f"model_{number}/{group.label}_seed_{run.mode.seed}"
                name = re.sub(r"[^\w./-]+", "_", name)
                metrics = _metrics(run)
                if metrics:
                    board.add_hparams(_choices(model, run), metrics, run_name=name)


def _choices(model: Model, run: ModeRun) -> dict[str, str | int | float]:
    mode = run.mode
    return {
        "model": model.title,
        "method": mode.method,
        "k": "picked" if mode.k is None else str(mode.k),
        "budget": "none" if mode.budget_k is None else f"{mode.budget_k:g}",
        "seed": mode.seed,
    }


def _metrics(run: ModeRun) -> dict[str, float]:
    found: dict[str, float] = {}
    for column in COLUMNS:
        if column.heading in run.columns:
            values = zip(column.headings, run.values(column), strict=True)
            found |= {f"benchmarks/{heading}": float(value) for heading, value in values}
            mean_k = float(run.routing[column.heading].mean_k_L.mean())
            found[f"mean_k/{column.heading}"] = mean_k
    return found
