"""The ragged token -> expert assignment: what dispatch hands to the experts.

Shapes: T tokens, E experts, A assignments (a token occurs 0..E times); N rows of C columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingPlan:
    """Which token goes to which expert with which weight; expert-major, tokens ascending within."""

    token_ids_A: Tensor  # int64, source row of every assignment
    expert_ids_A: Tensor  # int64, ascending
    weights_A: Tensor  # float32, combine weight, differentiable
    tokens_per_expert_E: Tensor  # int64, sums to A
    num_tokens: int
    counts_E: list[int] | None = None  # the same on the host, if it knows
    mask_TE: Tensor | None = None  # of a plan whose last entries may be spare; see `from_mask`

    @property
    def num_experts(self) -> int:
        return self.tokens_per_expert_E.numel()

    @property
    def counts_on_host(self) -> list[int]:
        """Of each expert. Waits for the device, unless they are known."""
        return self.tokens_per_expert_E.tolist() if self.counts_E is None else self.counts_E

    @classmethod
    def from_mask(
        cls,
        mask_TE: Tensor,
        weights_TE: Tensor,
        tokens_per_expert_E: Tensor | None = None,
        *,
        counts_E: list[int] | None = None,
        num_assignments: int | None = None,
        may_have_spare: bool = False,
    ) -> RoutingPlan:
        """The plan of a bool mask and the weights at its true entries.

        The transposed mask's nonzeros are already expert-major, so no sort is needed. Unless the
        host is given counts or `num_assignments` (the number of true entries), this waits for the
        device. With `may_have_spare` there are at most so many, and the rest of the plan stands
        for nothing: rows behind those of the last expert, which no product needs, no sum takes.
        """
        num_tokens, num_experts = mask_TE.shape
        if tokens_per_expert_E is None:
            tokens_per_expert_E = mask_TE.sum(0)
        if num_assignments is None:
            counts_E = tokens_per_expert_E.tolist() if counts_E is None else counts_E
            num_assignments = sum(counts_E)
        expert_ids_A, token_ids_A = torch.nonzero_static(
            mask_TE.t(), size=num_assignments, fill_value=0
        ).unbind(1)
        # index_select on the flat view: its backward is one index_add, not an index_put
        weights_A = weights_TE.reshape(-1).index_select(0, token_ids_A * num_experts + expert_ids_A)
        ids = token_ids_A, expert_ids_A
        mask = mask_TE if may_have_spare else None
        return cls(*ids, weights_A, tokens_per_expert_E, num_tokens, counts_E, mask)

    def row_major(self) -> RowMajor:
        shape = self.num_tokens, self.num_experts
        return row_major(self.token_ids_A, self.expert_ids_A, *shape, self.mask_TE)

    def without_spare(self) -> RoutingPlan:
        """The true entries alone; waits for the device if there may be others."""
        if self.mask_TE is None:
            return self
        num_assignments = sum(self.counts_on_host)
        names = ("token_ids_A", "expert_ids_A", "weights_A")
        cut = {name: getattr(self, name)[:num_assignments] for name in names}
        return replace(self, mask_TE=None, **cut)


class RowMajor(NamedTuple):
    """Where the entries of row 0, 1, .. stand, and where each row's share of these ends."""

    order_A: Tensor  # int64
    ends_N: Tensor  # int64


def row_major(
    rows_A: Tensor,
    columns_A: Tensor,
    num_rows: int,
    num_columns: int,
    mask_NC: Tensor | None = None,
) -> RowMajor:
    """Of entries that each have a cell (row, column) for themselves; in a row by column.

    No sort: an entry's place is the number of entries in the cells up to its own. Given the mask,
    the last entries may be spare, and keep their places.
    """
    cells_A = rows_A * num_columns + columns_A
    if mask_NC is None:
        taken_NC = torch.zeros(num_rows * num_columns, dtype=torch.int64, device=rows_A.device)
        up_to_NC = taken_NC.index_fill_(0, cells_A, 1).cumsum(0)
    else:
        up_to_NC = mask_NC.flatten().cumsum(0)
    entries_A = torch.arange(rows_A.numel(), device=rows_A.device)
    places_A = up_to_NC.index_select(0, cells_A) - 1
    if mask_NC is not None:
        places_A = torch.where(entries_A < up_to_NC[-1:], places_A, entries_A)
    order_A = torch.empty_like(entries_A).index_copy_(0, places_A, entries_A)
    return RowMajor(order_A, up_to_NC.view(num_rows, num_columns)[:, -1].contiguous())
