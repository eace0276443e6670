"""Metrics of a run: reduced over ranks, then to TensorBoard and metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from gemoe_ds.moe.context import Stat, TokenContext
from gemoe_ds.train.sample_log import whole_lines

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
        for layer, record in enumerate(ctx.layers):
            for name, stat in record.stats.items():
                self.add(f"{name}/layer_{layer:02d}", stat)

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


class Monitor:
    """Writer of scalars and histograms; only the first rank makes one.

    On resume, what a lost stretch of the run had written after `start_step` is dropped, so that no
    step appears twice.
    """

    def __init__(self, output: Path, start_step: int, tensorboard: bool) -> None:
        self.path = output / METRICS
        kept = []
        if start_step and self.path.exists():
            kept = [x for x in whole_lines(self.path) if json.loads(x)["step"] <= start_step]
        self.path.write_text("".join(kept), encoding="utf-8")
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 (lives as long as the run)
        self.board = (
            SummaryWriter(output / "tensorboard", purge_step=start_step + 1)
            if tensorboard
            else None
        )

    def write(self, step: int, values: dict[str, float | Tensor]) -> None:
        """Scalars and vectors of one step; a vector is a histogram on TensorBoard."""
        tensors = {n: torch.as_tensor(value, dtype=torch.float64) for n, value in values.items()}
        line = {"step": step} | {name: tensor.tolist() for name, tensor in tensors.items()}
        self.file.write(json.dumps(line) + "\n")
        for name, tensor in tensors.items() if self.board else ():
            if tensor.dim() == 0:
                self.board.add_scalar(name, tensor.item(), step)
            elif tensor.sum() > 0:
                self._histogram(name, tensor, step)

    def _histogram(self, name: str, counts_N: Tensor, step: int) -> None:
        """Counts of the values 0..N-1 as a TensorBoard histogram, without expanding them."""
        assert self.board is not None
        values = torch.arange(counts_N.numel()).double()
        self.board.add_histogram_raw(
            name,
            min=0.0,
            max=float(counts_N.numel() - 1),
            num=counts_N.sum().item(),
            sum=(counts_N * values).sum().item(),
            sum_squares=(counts_N * values.square()).sum().item(),
            bucket_limits=(values + 0.5).tolist(),
            bucket_counts=counts_N.tolist(),
            global_step=step,
        )

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def seconds_in(run: Path) -> float:
    """Wall time of the steps that a run's metrics.jsonl holds, over all its restarts."""
    lines = (run / METRICS).read_text().splitlines()
    return sum(json.loads(line)["throughput/seconds"] for line in lines)
