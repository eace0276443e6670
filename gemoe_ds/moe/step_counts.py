"""What the routers count during a step, summed over its micro-batches and over the ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from gemoe_ds.moe.context import TokenContext

Sum = Callable[[Tensor], None]  # sums a tensor over all ranks, in place


class StepCounts:
    """Adds up `LayerRecord.step_counts`, layer by layer; costs nothing where no router counts."""

    def __init__(self, num_layers: int) -> None:
        self.layers: list[dict[str, Tensor]] = [{} for _ in range(num_layers)]
        self._is_read = False  # at least once, or it has been warned

    def add(self, ctx: TokenContext) -> None:
        """After a forward that trains."""
        for sums, record in zip(self.layers, ctx.layers, strict=True):
            for name, value in record.step_counts.items():
                value = value.double()
                sums[name] = sums[name] + value if name in sums else value

    def warn_if_unread(self, router: str) -> None:
        """In a forward that evaluates: once, if training was counted and nobody has asked."""
        if self._is_read or not any(self.layers):
            return
        self._is_read = True
        warnings.warn(
            f"router {router!r} is evaluated after training in which after_step(step, total_steps) "
            "was never called: it knows nothing of what it counted there; call it after each "
            "optimizer.step(), in Trainer by callbacks=[handle.trainer_callback()]",
            stacklevel=2,
        )

    def reduced(self, sum_over_ranks: Sum) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Sums of each layer and of all of them, and a fresh start. One collective, or none."""
        self._is_read = True
        layers, self.layers = self.layers, [{} for _ in self.layers]
        flat = [value.reshape(-1) for sums in layers for value in sums.values()]
        if not flat:
            return layers, {}
        packed = torch.cat(flat)
        sum_over_ranks(packed)
        sizes = [part.numel() for part in flat]
        parts = iter(torch.split(packed, sizes))
        layers = [{n: next(parts).view_as(v) for n, v in sums.items()} for sums in layers]
        model: dict[str, Tensor] = {}
        for sums in layers:
            for name, value in sums.items():
                model[name] = model[name] + value if name in model else value
        return layers, model
