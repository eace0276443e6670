"""Rows to their experts and back: in one process, or to the ranks that hold the experts.

A layer talks to its dispatcher twice: `dispatch_preprocess` as soon as the choice of experts is
made, so that the counts travel while the router works out its losses, then the call itself.

Shapes: T tokens here, D model, R ranks, E experts in all, L = E / R experts here; P (token, rank)
pairs sent, Q pairs received, A assignments of the local tokens, B assignments to the local experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemoe_ds.moe.all_to_all import AllToAll, AsyncWork, TokenExchange, UnevenAllToAll
from gemoe_ds.moe.context import TokenContext
from gemoe_ds.moe.gather_scatter import gather_rows, scatter_add_rows
from gemoe_ds.moe.host_copy import HostCopy
from gemoe_ds.moe.plan import RoutingPlan, row_major
from gemoe_ds.moe.router import Router
from gemoe_ds.moe.triton_launch import available

ExpertFn = Callable[[Tensor, RoutingPlan], Tensor]  # x_ND, plan -> y_ND, e.g. `Experts`
SharedFn = Callable[[Tensor], Tensor | None]  # x_TD -> y_TD; None: nothing to add


class Sizes(NamedTuple):
    """What shapes say of the number of assignments."""

    exactly: int | None = None
    at_most: int | None = None  # where it need not be exact: nothing goes backward


UNKNOWN = Sizes()


def known_sizes(router: Router, ctx: TokenContext, *, writes: bool) -> Sizes:
    """What is known of the number of assignments without asking the device; `writes`: nothing
    goes backward, as while answers are written."""
    num_tokens = len(ctx.is_valid_T)
    if ctx.intervene is not None:
        return UNKNOWN
    if router.static_k is not None and not ctx.may_have_padding:
        return Sizes(exactly=router.static_k * num_tokens)
    return Sizes(at_most=router.max_k * num_tokens) if writes else UNKNOWN


class Dispatcher(ABC):
    """Applies the experts to the tokens that chose them and combines what comes back."""

    @abstractmethod
    def dispatch_preprocess(self, mask_TE: Tensor, sizes: Sizes = UNKNOWN) -> Any:
        """Start what only needs to know who goes where; the result goes into the call."""

    @abstractmethod
    def __call__(
        self,
        x_TD: Tensor,
        weights_TE: Tensor,
        preprocessed: Any,
        experts: ExpertFn,
        shared: SharedFn | None = None,
    ) -> Tensor:
        """sum over the token's assignments of weight * expert(x), plus `shared(x)`; dtype of x."""


class _Counted(NamedTuple):
    mask_TE: Tensor
    tokens_per_expert_E: Tensor
    number: HostCopy | int  # of assignments; a copy of the counts on its way to the host
    is_bound: bool = False  # there may be fewer


# On a GPU so many assignments are gone through at once, chosen or not: the host then needs not
# wait to know how many they are, and a CUDA graph can hold the layer.
MOST_AT_ONCE = 4096


class LocalDispatcher(Dispatcher):
    """All experts live here; nothing travels."""

    def dispatch_preprocess(self, mask_TE: Tensor, sizes: Sizes = UNKNOWN) -> _Counted:
        counts_E = mask_TE.sum(0)
        if sizes.exactly is not None:
            return _Counted(mask_TE, counts_E, sizes.exactly)
        if (
            sizes.at_most is not None
            and sizes.at_most <= MOST_AT_ONCE
            and available(mask_TE.device)
        ):
            return _Counted(mask_TE, counts_E, sizes.at_most, is_bound=True)
        return _Counted(mask_TE, counts_E, HostCopy(counts_E))

    def __call__(
        self,
        x_TD: Tensor,
        weights_TE: Tensor,
        preprocessed: _Counted,
        experts: ExpertFn,
        shared: SharedFn | None = None,
    ) -> Tensor:
        mask_TE, per_expert_E, number, is_bound = preprocessed
        known: dict[str, Any] = {"num_assignments": number, "may_have_spare": is_bound}
        if isinstance(number, HostCopy):
            known = {"counts_E": number.value.tolist()}
        plan = RoutingPlan.from_mask(mask_TE, weights_TE, per_expert_E, **known)
        y_TD = experts(x_TD, plan)
        shared_TD = None if shared is None else shared(x_TD)
        return y_TD if shared_TD is None else y_TD + shared_TD


@dataclass
class Traffic:
    """What one dispatcher has sent to OTHER ranks since it was made, forward passes only."""

    rows: int = 0  # (token, remote rank) pairs, each one row there and one back
    row_bytes: int = 0  # there and back
    metadata_bytes: int = 0  # counts, and a row number and a weight an assignment


@dataclass
class _Preprocessed:
    """The counts under way, and what was worked out for them."""

    mask_TE: Tensor
    sends_RT: Tensor  # bool: the token goes to that rank
    counts: Tensor  # int64 [R, 1 + L]: rows, then assignments to each expert there
    received: Tensor  # the same from each rank, once `work` is done
    work: AsyncWork


class AllToAllDispatcher(Dispatcher):
    """Experts in R equal consecutive blocks over the ranks of a group.

    A token's row goes to a rank ONCE however many of its experts live there; row numbers and
    weights travel along, partial sums are formed where the experts are, and one row comes back per
    pair. Bytes each way = pairs * D * itemsize. Every rank takes part in every exchange in the same
    order, with zero rows too: one of counts, then rows and metadata together, then the rows back.
    The host waits for the device once, to read the counts. `shared` runs while the rows travel, in
    the forward and in the backward pass.
    """

    def __init__(self, all_to_all: AllToAll, rank: int, num_ranks: int) -> None:
        self.all_to_all = all_to_all
        self.rank = rank
        self.num_ranks = num_ranks
        self.traffic = Traffic()

    def dispatch_preprocess(self, mask_TE: Tensor, sizes: Sizes = UNKNOWN) -> _Preprocessed:
        num_tokens, num_experts = mask_TE.shape
        mask_TRL = mask_TE.view(num_tokens, self.num_ranks, num_experts // self.num_ranks)
        sends_RT = mask_TRL.any(2).t().contiguous()
        counts = torch.cat([sends_RT.sum(1, keepdim=True), mask_TRL.sum(0)], dim=1)
        received = torch.empty_like(counts)
        ones = [1] * self.num_ranks
        work = self.all_to_all(received, counts, ones, ones)
        return _Preprocessed(mask_TE, sends_RT, counts, received, work)

    def __call__(
        self,
        x_TD: Tensor,
        weights_TE: Tensor,
        preprocessed: _Preprocessed,
        experts: ExpertFn,
        shared: SharedFn | None = None,
    ) -> Tensor:
        counts, received = preprocessed.counts, preprocessed.received
        sends_RT, rows_TD = preprocessed.sends_RT, x_TD
        if x_TD.dtype == torch.float32 and torch.is_autocast_enabled(x_TD.device.type):
            # A LayerNorm gives these under CUDA's autocast; the experts round them anyway.
            rows_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
        preprocessed.work.wait()
        sent, got = torch.stack([counts, received]).tolist()  # the one wait of the host
        sent_rows, got_rows = ([of_rank[0] for of_rank in one] for one in (sent, got))
        sent_assignments, got_assignments = (
            [sum(of_rank[1:]) for of_rank in one] for one in (sent, got)
        )
        # 1. The pairs, rank-major, and for every assignment the place of its row in its block.
        num_assignments = sum(sent_assignments)
        plan = RoutingPlan.from_mask(
            preprocessed.mask_TE, weights_TE, num_assignments=num_assignments
        )
        rank_ids_P, token_ids_P = torch.nonzero_static(sends_RT, size=sum(sent_rows)).unbind(1)
        rank_ids_A = torch.arange(self.num_ranks, device=x_TD.device).repeat_interleave(
            counts[:, 1:].sum(1), output_size=num_assignments
        )
        row_offsets_A = (sends_RT.cumsum(1) - 1)[rank_ids_A, plan.token_ids_A]
        order = None
        if available(x_TD.device):
            order = row_major(token_ids_P, rank_ids_P, x_TD.shape[0], self.num_ranks)
        # 2. Rows, places and weights travel; experts follow from the counts.
        exchange = TokenExchange(
            UnevenAllToAll(self.all_to_all, sent_rows, got_rows),
            UnevenAllToAll(self.all_to_all, sent_assignments, got_assignments),
        )
        dispatched = exchange.dispatch_start(
            gather_rows(rows_TD, token_ids_P, order), plan.weights_A, row_offsets_A
        )
        shared_TD = None if shared is None else shared(x_TD)
        rows_QD, weights_B, row_offsets_B = exchange.dispatch_finish(dispatched)
        # 3. One partial sum a pair, back home in the rows' dtype, summed there in float32.
        partial_QD = experts(rows_QD, _plan_of_received(received, got, row_offsets_B, weights_B))
        partial_PD = exchange.combine(partial_QD)
        self._count(sent_rows, sent_assignments, rows_TD, counts, plan.weights_A)
        home_TD = scatter_add_rows(partial_PD, token_ids_P, x_TD.shape[0], order).to(x_TD.dtype)
        return home_TD if shared_TD is None else home_TD + shared_TD

    def _count(
        self,
        sent_rows: list[int],
        sent_assignments: list[int],
        x_TD: Tensor,
        counts: Tensor,
        weights_A: Tensor,
    ) -> None:
        remote_rows = sum(sent_rows) - sent_rows[self.rank]
        remote_assignments = sum(sent_assignments) - sent_assignments[self.rank]
        self.traffic.rows += remote_rows
        self.traffic.row_bytes += 2 * remote_rows * x_TD.shape[1] * x_TD.itemsize
        self.traffic.metadata_bytes += (
            remote_assignments * 2 * weights_A.itemsize
            + (self.num_ranks - 1) * counts.shape[1] * counts.itemsize
        )


def _plan_of_received(
    received: Tensor, on_host: list[list[int]], row_offsets_B: Tensor, weights_B: Tensor
) -> RoutingPlan:
    """From source-major, expert-major within a source, to expert-major.

    `received` int64 [R, 1 + L], also `on_host`, counts rows and assignments; a place counts from
    the first row of its source. No sort: an expert's rows move in one piece from each source.
    """
    rows_R, counts_RL = received[:, 0], received[:, 1:]
    num_ranks, num_local = counts_RL.shape
    num_assignments = row_offsets_B.numel()
    first_R = rows_R.cumsum(0) - rows_R
    row_ids_B = row_offsets_B + first_R.repeat_interleave(
        counts_RL.sum(1), output_size=num_assignments
    )
    counts_LR = counts_RL.t().contiguous()
    before_RL = (counts_RL.reshape(-1).cumsum(0) - counts_RL.reshape(-1)).view_as(counts_RL)
    before_LR = (counts_LR.view(-1).cumsum(0) - counts_LR.view(-1)).view_as(counts_LR)
    pieces_B = torch.arange(num_local * num_ranks, device=counts_LR.device).repeat_interleave(
        counts_LR.view(-1), output_size=num_assignments
    )
    moved_B = (before_RL.t() - before_LR).reshape(-1).index_select(0, pieces_B)
    order_B = torch.arange(num_assignments, device=moved_B.device) + moved_B
    row_ids_B, weights_B = row_ids_B.index_select(0, order_B), weights_B.index_select(0, order_B)
    expert_ids_B = pieces_B // num_ranks
    num_rows, *counts = map(sum, zip(*on_host, strict=True))
    return RoutingPlan(row_ids_B, expert_ids_B, weights_B, counts_RL.sum(0), num_rows, counts)
