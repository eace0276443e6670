"""Where this process is in a run, for whoever reports that it does not move. Costs an assignment.

Every rank makes the same moves in the same order (a step's phases, its layers, its collectives),
so the rank with the fewest is the one that the others wait for.
"""

from __future__ import annotations

from dataclasses import dataclass

DATA, COMPUTE, UPDATE = "waiting for data", "forward and backward", "update"
EVALUATE, GENERATE = "evaluating", "generating"
SHORT_PHASES = (DATA, COMPUTE, UPDATE, EVALUATE, GENERATE)


@dataclass
class Position:
    phase: str = "starting"
    step: int | None = None
    layer: int | None = None
    collective: str | None = None
    is_waiting: bool = False
    num_events: int = 0

    @property
    def is_short(self) -> bool:
        """In a part of a step or a batch, of which none takes minutes; loading and saving may."""
        return self.phase in SHORT_PHASES

    def enter(self, phase: str, step: int | None = None) -> None:
        """A new phase; layers and collectives of the one before are forgotten."""
        self.phase, self.layer, self.collective, self.is_waiting = phase, None, None, False
        self.step = self.step if step is None else step
        self.num_events += 1

    def enter_layer(self, layer: int) -> None:
        self.layer = layer
        self.num_events += 1

    def wait_for(self, collective: str) -> None:
        self.collective, self.is_waiting = collective, True
        self.num_events += 1

    def arrived(self) -> None:
        self.is_waiting = False
        self.num_events += 1

    def __str__(self) -> str:
        parts = [] if self.step is None else [f"step {self.step}"]
        parts.append(self.phase)
        if self.layer is not None:
            parts.append(f"layer {self.layer}")
        if self.collective:
            parts.append(f"{'in' if self.is_waiting else 'after'} {self.collective}")
        return ", ".join(parts)


PROGRESS = Position()
