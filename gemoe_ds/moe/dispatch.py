"""Rows to their experts and back: in one process, or to the ranks that hold the experts.

Shapes: T tokens here, D model, R ranks, E experts in all, L = E / R experts here; P (token, rank)
pairs sent, Q pairs received, A assignments of the local tokens, B assignments to the local experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from gemoe_ds.moe.plan import RoutingPlan

# (rows_BD, weights_B, rows_per_expert_L) -> weight * y_BD
ExpertFn = Callable[[Tensor, Tensor, Tensor], Tensor]
# (output, input, output_splits, input_splits): the collective itself, e.g. of torch.distributed
AllToAll = Callable[[Tensor, Tensor, list[int], list[int]], None]


class Dispatcher(ABC):
    """Applies the experts to the tokens of a plan and combines what comes back."""

    @abstractmethod
    def __call__(self, x_TD: Tensor, plan: RoutingPlan, experts: ExpertFn) -> Tensor:
        """y_TD = sum over the token's assignments of weight * expert(x), dtype of `x_TD`."""


def combine(weighted_AD: Tensor, row_ids_A: Tensor, num_rows: int) -> Tensor:
    """Sum of the weighted expert outputs of each row, [num_rows, D].

    Accumulates in float32 at least: a bf16 sum over up to 8 experts would lose the small ones.
    """
    weighted_AD = weighted_AD.to(torch.promote_types(weighted_AD.dtype, torch.float32))
    sums = weighted_AD.new_zeros(num_rows, weighted_AD.shape[1])
    return sums.index_add(0, row_ids_A, weighted_AD)


class LocalDispatcher(Dispatcher):
    """All experts live here; nothing travels."""

    def __call__(self, x_TD: Tensor, plan: RoutingPlan, experts: ExpertFn) -> Tensor:
        rows_AD = x_TD.index_select(0, plan.token_ids_A)
        weighted_AD = experts(rows_AD, plan.weights_A, plan.tokens_per_expert_E)
        return combine(weighted_AD, plan.token_ids_A, plan.num_tokens).to(x_TD.dtype)


@dataclass
class Traffic:
    """What one dispatcher has sent to OTHER ranks since it was made, forward passes only."""

    rows: int = 0  # (token, remote rank) pairs, each one row there and one back
    row_bytes: int = 0  # there and back
    metadata_bytes: int = 0  # counts, row numbers, weights


class AllToAllDispatcher(Dispatcher):
    """Experts in R equal consecutive blocks over the ranks of a group.

    A token's row goes to a rank ONCE however many of its experts live there; the weights travel
    along, partial sums are formed where the experts are, and one row comes back per pair. Bytes
    each way = pairs * D * itemsize. Every rank takes part in every exchange in the same order,
    with zero rows too. One count exchange a layer. On a GPU the host waits twice here (the list of
    pairs, the counts) and once in the plan.
    """

    def __init__(self, all_to_all: AllToAll, rank: int, num_ranks: int) -> None:
        self.all_to_all = all_to_all
        self.rank = rank
        self.num_ranks = num_ranks
        self.traffic = Traffic()

    def __call__(self, x_TD: Tensor, plan: RoutingPlan, experts: ExpertFn) -> Tensor:
        num_ranks, num_experts = self.num_ranks, plan.num_experts
        num_local = num_experts // num_ranks
        # 1. The pairs, rank-major, and for every assignment the place of its row in its block.
        counts_RL = plan.tokens_per_expert_E.view(num_ranks, num_local)
        rank_ids_A = torch.arange(num_ranks, device=x_TD.device).repeat_interleave(
            counts_RL.sum(1), output_size=plan.token_ids_A.numel()
        )
        sends_RT = torch.zeros(num_ranks, plan.num_tokens, dtype=torch.bool, device=x_TD.device)
        sends_RT[rank_ids_A, plan.token_ids_A] = True
        place_RT = sends_RT.cumsum(1) - 1
        places_A = place_RT[rank_ids_A, plan.token_ids_A]
        token_ids_P = sends_RT.nonzero(as_tuple=True)[1]
        # 2. The one count exchange: rows, and assignments to each expert.
        counts = torch.cat([sends_RT.sum(1, keepdim=True), counts_RL], dim=1)
        received = torch.empty_like(counts)
        self.all_to_all(received, counts, [1] * num_ranks, [1] * num_ranks)
        sent_rows, sent_assignments, got_rows, got_assignments = torch.stack(
            [counts[:, 0], counts[:, 1:].sum(1), received[:, 0], received[:, 1:].sum(1)]
        ).tolist()
        rows = _Exchange(self.all_to_all, sent_rows, got_rows)
        assignments = _Exchange(self.all_to_all, sent_assignments, got_assignments)
        # 3. Rows, weights and places travel; experts follow from the counts.
        rows_QD, weights_B = _Travel.apply(  # type: ignore[no-untyped-call]
            x_TD.index_select(0, token_ids_P), plan.weights_A, rows, assignments
        )
        row_ids_B = assignments.send(places_A)
        base_R = received[:, 0].cumsum(0) - received[:, 0]
        row_ids_B = row_ids_B + base_R.repeat_interleave(
            received[:, 1:].sum(1), output_size=sum(got_assignments)
        )
        # 4. Source-major to expert-major, stable: the sum's order does not depend on timing.
        expert_ids_B = (
            torch.arange(num_local, device=x_TD.device)
            .repeat(num_ranks)
            .repeat_interleave(received[:, 1:].reshape(-1), output_size=sum(got_assignments))
        )
        order_B = expert_ids_B.argsort(stable=True)
        row_ids_B, weights_B = row_ids_B[order_B], weights_B.index_select(0, order_B)
        weighted_BD = experts(rows_QD.index_select(0, row_ids_B), weights_B, received[:, 1:].sum(0))
        # 5. One partial sum a pair, back home in the rows' dtype, summed there in float32.
        partial_QD = combine(weighted_BD, row_ids_B, rows_QD.shape[0]).to(x_TD.dtype)
        partial_PD = _Return.apply(partial_QD, rows)  # type: ignore[no-untyped-call]
        self._count(sent_rows, sent_assignments, x_TD, counts, places_A, plan.weights_A)
        sum_dtype = torch.promote_types(x_TD.dtype, torch.float32)
        home_TD = torch.zeros(x_TD.shape, dtype=sum_dtype, device=x_TD.device)
        return home_TD.index_add(0, token_ids_P, partial_PD.to(sum_dtype)).to(x_TD.dtype)

    def _count(
        self,
        sent_rows: list[int],
        sent_assignments: list[int],
        x_TD: Tensor,
        counts: Tensor,
        places_A: Tensor,
        weights_A: Tensor,
    ) -> None:
        remote_rows = sum(sent_rows) - sent_rows[self.rank]
        remote_assignments = sum(sent_assignments) - sent_assignments[self.rank]
        self.traffic.rows += remote_rows
        self.traffic.row_bytes += 2 * remote_rows * x_TD.shape[1] * x_TD.itemsize
        self.traffic.metadata_bytes += (
            remote_assignments * (places_A.itemsize + weights_A.itemsize)
            + (self.num_ranks - 1) * counts.shape[1] * counts.itemsize
        )


class _Exchange:
    """One uneven all-to-all of rows and its reverse."""

    def __init__(self, all_to_all: AllToAll, sent: list[int], received: list[int]) -> None:
        self.all_to_all, self.sent, self.received = all_to_all, sent, received

    def send(self, rows: Tensor) -> Tensor:
        output = rows.new_empty(sum(self.received), *rows.shape[1:])
        self.all_to_all(output, rows.contiguous(), self.received, self.sent)
        return output

    def send_back(self, rows: Tensor) -> Tensor:
        output = rows.new_empty(sum(self.sent), *rows.shape[1:])
        self.all_to_all(output, rows.contiguous(), self.sent, self.received)
        return output


class _Travel(torch.autograd.Function):
    """Rows and weights go out together, so that their gradients return in one fixed order."""

    @staticmethod
    def forward(
        ctx: Any, rows_PD: Tensor, weights_A: Tensor, rows: _Exchange, assignments: _Exchange
    ) -> tuple[Tensor, Tensor]:
        ctx.rows, ctx.assignments = rows, assignments
        return rows.send(rows_PD), assignments.send(weights_A)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_rows_QD: Tensor, grad_weights_B: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        # needs_input_grad follows from which parameters train: the same on every rank.
        grad_rows = ctx.rows.send_back(grad_rows_QD) if ctx.needs_input_grad[0] else None
        grad_weights = (
            ctx.assignments.send_back(grad_weights_B) if ctx.needs_input_grad[1] else None
        )
        return grad_rows, grad_weights, None, None


class _Return(torch.autograd.Function):
    """Partial sums go home."""

    @staticmethod
    def forward(ctx: FunctionCtx, partial_QD: Tensor, rows: _Exchange) -> Tensor:
        ctx.rows = rows  # type: ignore[attr-defined]
        return rows.send_back(partial_QD)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_PD: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.send(grad_PD), None  # type: ignore[attr-defined]
