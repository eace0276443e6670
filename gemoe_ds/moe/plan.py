"""The ragged token -> expert assignment: what dispatch hands to the experts.

Shapes: T tokens, E experts, A assignments (a token occurs 0..E times).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingPlan:
    """Which token goes to which expert with which weight; expert-major, tokens ascending within."""

    token_ids_A: Tensor  # int64, source row of every assignment
    weights_A: Tensor  # float32, combine weight, differentiable
    tokens_per_expert_E: Tensor  # int64, sums to A
    num_tokens: int

    @property
    def num_experts(self) -> int:
        return self.tokens_per_expert_E.numel()

    @classmethod
    def from_mask(
        cls, mask_TE: Tensor, weights_TE: Tensor, num_assignments: int | None = None
    ) -> RoutingPlan:
        """The plan of a bool mask and the weights at its true entries.

        The transposed mask's nonzeros are already expert-major, so no sort is needed. Unless
        `num_assignments` (the number of true entries) is given, this waits for the device.
        """
        num_tokens, num_experts = mask_TE.shape
        counts_E = mask_TE.sum(0)
        if num_assignments is None:
            num_assignments = int(counts_E.sum())
        expert_ids_A, token_ids_A = torch.nonzero_static(mask_TE.t(), size=num_assignments).unbind(
            1
        )
        # index_select on the flat view: its backward is one index_add, not an index_put
        weights_A = weights_TE.reshape(-1).index_select(0, token_ids_A * num_experts + expert_ids_A)
        return cls(token_ids_A, weights_A, counts_E, num_tokens)
