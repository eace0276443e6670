"""The expert that does not exist: its place in the map of experts."""

from __future__ import annotations

import torch
from torch import Tensor

NOT_HERE = -1  # in vLLM's expert maps, for what another rank holds


def padded_map(expert_map_E: Tensor | None, num_experts: int, device: torch.device) -> Tensor:
    """int32 [E + 1]: where this rank has expert 0..E-1 (None: all in order), and NOT_HERE for E."""
    if expert_map_E is None:
        expert_map_E = torch.arange(num_experts, dtype=torch.int32, device=device)
    return torch.cat([expert_map_E, expert_map_E.new_full((1,), NOT_HERE)])
