"""Where weights are kept that do not train, and which ranks keep the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from gemoe_ds.hf_io.key_rules import Shape


class Peers:
    """Ranks that keep the same: one of them reads a file, and the others receive what is in it."""

    rank, size = 0, 1

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """The tensor of peer `source`, in place. Collective."""


NO_PEERS = Peers()


@dataclass(frozen=True)
class Sharing:
    """Which ranks keep what this rank keeps, by kind."""

    whole: Peers = NO_PEERS  # tensors that every rank has for itself
    rows: Peers = NO_PEERS  # of experts
    common: Peers = NO_PEERS  # this rank's part of what the ranks of its host have in common:
    part: tuple[int, int] = (0, 1)  # which one, of how many


class WeightAllocator:
    """Each process has its own; `engine.host_memory` has one for all ranks of a host."""

    rank, num_ranks = 0, 1  # among those that have it in common
    note = ""  # what a run should say of it

    def allocate(self, shapes: Sequence[Shape], dtype: torch.dtype) -> list[Tensor]:
        """Tensors of undefined values. Collective: every rank asks for the same."""
        return [torch.empty(shape, dtype=dtype) for shape in shapes]

    @contextmanager
    def sharing(self, rows: str) -> Iterator[Sharing]:
        """Until the end of the block; equal `rows` are those of ranks that keep equal rows of
        experts. Collective."""
        yield Sharing(part=(self.rank, self.num_ranks))

    def first_error(self, problem: str | None) -> str | None:
        """The first problem that any rank has; none goes on before all are here. Collective."""
        return problem


LOCAL = WeightAllocator()
