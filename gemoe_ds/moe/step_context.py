"""What a router is told after an optimizer step: how far the run is, and its own counts, summed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from gemoe_ds.moe.experts.module import Experts

Assign = Callable[[Tensor, Tensor], None]  # of a parameter
Read = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StepContext:
    """After step `step` of `total_steps`, counted from 1; the same on every rank.

    `layer` and `model` hold what `Router.step_counts` gave, float64, summed over the step's
    micro-batches and all ranks: of this router's layer, and of all layers. The functions are
    collective: call them on every rank or on none.
    """

    step: int
    total_steps: int
    layer: dict[str, Tensor]
    model: dict[str, Tensor]
    assign_: Assign  # (parameter, value): survives ZeRO, which a plain copy_ does not
    read_param: Read  # the whole parameter, wherever its parts are
    experts: Experts  # of this layer, those that this rank holds
    first_expert: int = 0  # the global number of the first of them
    broadcast_from_first: Read = lambda tensor: tensor  # what it is on the rank that holds expert 0

    @property
    def progress(self) -> float:
        return self.step / self.total_steps

    @property
    def expert_ids(self) -> range:
        """The global numbers of the experts here."""
        return range(self.first_expert, self.first_expert + self.experts.num_experts)
