"""Metrics of a run: added up over its micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gemoe_ds.checkpoint.manifest import MANIFEST, read
from gemoe_ds.files import step_lines
from gemoe_ds.moe.context import Stat, TokenContext
from gemoe_ds.moe.metrics import IN_SHORT, layer_stats

METRICS = "metrics.jsonl"

Sum = Callable[[Tensor], None]  # sums a tensor over all ranks, in place


class StatSum:
    """Adds up statistics over micro-batches, then over ranks in one collective."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.reductions: dict[str, str] = {}

    def add(self, name: str, stat: Stat) -> None:
        total = stat.total.detach().double().cpu()
        count = torch.as_tensor(stat.count).detach().double().cpu()
        if name in self.totals:
            total, count = self.totals[name] + total, self.counts[name] + count
        self.totals[name], self.counts[name] = total, count
        self.reductions[name] = stat.reduction

    def add_layers(self, ctx: TokenContext) -> None:
        """What the routers of the last forward pass recorded, by layer."""
        for name, stat in layer_stats(ctx):
            self.add(name, stat)

    def reduced(self, sum_over_ranks: Sum, device: torch.device) -> dict[str, Tensor]:
        """Values by name, and a fresh start; a mean over nothing is left out. Collective."""
        names = sorted(self.totals)
        if not names:
            return {}
        pieces = [piece.reshape(-1) for n in names for piece in (self.totals[n], self.counts[n])]
        packed = torch.cat(pieces).to(device)
        sum_over_ranks(packed)
        summed = iter(packed.cpu().split([piece.numel() for piece in pieces]))
        values = {}
        for name in names:
            total, count = next(summed).reshape(self.totals[name].shape), next(summed).squeeze()
            if self.reductions[name] == "sum":
                values[name] = total
            elif count > 0:
                values[name] = total / count
        self.totals, self.counts, self.reductions = {}, {}, {}
        return values


def seconds_in(run: Path) -> float | None:
    """Wall time of the steps that a run's metrics.jsonl holds, over all its restarts; of one of its
    checkpoints up to there. None where there is no such file."""
    last: float = math.inf
    if (run / MANIFEST).exists():
        run, last = run.resolve().parent.parent, read(run).step
    if not (run / METRICS).is_file():
        return None
    entries = [entry for _, entry in step_lines(run / METRICS) if entry["step"] <= last]
    return sum(entry.get("throughput/seconds", 0.0) for entry in entries)


def in_short(values: dict[str, float | Tensor]) -> dict[str, str]:
    """For the progress bar."""
    shown = {"loss": "loss/total"} | {name: name for name in IN_SHORT}
    shown |= {"tokens/s": "throughput/tokens_per_second", "validation": "validation/loss"}
    return {name: f"{float(values[key]):.4g}" for name, key in shown.items() if key in values}
