"""Where weights are kept that do not train and that every rank holds alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemoe_ds.hf_io.key_rules import Shape


class WeightAllocator:
    """Each process has its own; `engine.host_memory` has one for all ranks of a host."""

    rank, num_ranks = 0, 1  # among those that have it in common

    def allocate(self, shapes: Sequence[Shape], dtype: torch.dtype) -> list[Tensor]:
        """Tensors of undefined values. Collective: every rank asks for the same."""
        return [torch.empty(shape, dtype=dtype) for shape in shapes]

    def first_error(self, problem: str | None) -> str | None:
        """The first problem that any rank has; none goes on before all are here. Collective."""
        return problem


LOCAL = WeightAllocator()
