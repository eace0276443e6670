"""Uneven all-to-alls under autograd, started early and waited for late.

An exchange has two ends, `dispatch_start` and `dispatch_finish`: what stands between them runs
while the rows travel. In the backward pass the order is reversed, and so is the exchange: the
gradient leaves where the rows arrived, and is waited for where they left. Autograd works off
nodes in the reverse order of their making, on every rank the same; so what ran between runs
backward in between too.

Shapes: D model; P pairs sent, Q pairs received, A assignments sent, B received.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class AsyncWork(Protocol):
    """A collective under way; `wait` returns when its output may be used."""

    def wait(self) -> Any: ...


# (output, input, output_splits, input_splits): the collective itself, started and not waited for
AllToAll = Callable[[Tensor, Tensor, list[int], list[int]], AsyncWork]

_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


class UnevenAllToAll:
    """One uneven all-to-all of rows: how many go to and come from every rank."""

    def __init__(self, all_to_all: AllToAll, sent: list[int], received: list[int]) -> None:
        self.all_to_all, self.sent, self.received = all_to_all, sent, received

    def start(self, rows: Tensor, *, back: bool = False) -> PendingAllToAll:
        give, take = (self.received, self.sent) if back else (self.sent, self.received)
        return PendingAllToAll(self.all_to_all, rows.contiguous(), give, take)


class PendingAllToAll:
    """Rows under way; holds what is sent until it has arrived."""

    def __init__(
        self, all_to_all: AllToAll, rows: Tensor, give: list[int], take: list[int]
    ) -> None:
        self.sent: Tensor | None = rows
        self.output = rows.new_empty(sum(take), *rows.shape[1:])
        self.work = all_to_all(self.output, rows, take, give)

    def wait(self) -> Tensor:
        self.work.wait()
        self.sent = None
        return self.output


@dataclass(frozen=True)
class Dispatched:
    """Rows and metadata on the way out. `dispatch_start`'s node must not hold this: it would hold
    its own outputs, a cycle through C++ that nobody collects."""

    rows_QD: Tensor
    metadata_B2: Tensor
    pending: tuple[PendingAllToAll, PendingAllToAll]


class TokenExchange:
    """Rows and their metadata on the way out, and their gradients on the way back."""

    def __init__(self, rows: UnevenAllToAll, assignments: UnevenAllToAll) -> None:
        self.rows, self.assignments = rows, assignments
        self.gradients: list[PendingAllToAll | None] = []  # under way in the backward pass
        self.needs_grad = (False, False)

    def dispatch_start(
        self, rows_PD: Tensor, weights_A: Tensor, row_offsets_A: Tensor
    ) -> Dispatched:
        """Start; the result is to be handed to `dispatch_finish`, and holds nothing before."""
        # a place is an integer in the bits of a float beside its weight: one exchange, not two
        row_offsets_A = row_offsets_A.to(_INTEGER[weights_A.dtype]).view(weights_A.dtype)
        metadata_A2 = torch.stack([weights_A.detach(), row_offsets_A], dim=1)
        pending = self.rows.start(rows_PD.detach()), self.assignments.start(metadata_A2)
        rows_QD, metadata_B2 = _DispatchStart.apply(rows_PD, weights_A, pending, self)  # type: ignore[no-untyped-call]
        return Dispatched(rows_QD, metadata_B2, pending)

    def dispatch_finish(self, dispatched: Dispatched) -> tuple[Tensor, Tensor, Tensor]:
        """rows_QD, weights_B and row_offsets_B (int64), complete."""
        for pending in dispatched.pending:
            pending.wait()
        return _DispatchFinish.apply(dispatched.rows_QD, dispatched.metadata_B2, self)  # type: ignore[no-untyped-call,no-any-return]

    def combine(self, rows_QD: Tensor) -> Tensor:
        """Rows back to where theirs came from, complete, [P, D]."""
        return _Combine.apply(rows_QD, self.rows)  # type: ignore[no-untyped-call,no-any-return]


class _DispatchStart(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_PD: Tensor,
        weights_A: Tensor,
        pending: tuple[PendingAllToAll, PendingAllToAll],
        exchange: TokenExchange,
    ) -> tuple[Tensor, Tensor]:
        ctx.exchange = exchange
        # follows from which parameters train: the same on every rank
        exchange.needs_grad = ctx.needs_input_grad[:2]
        rows_QD, metadata_B2 = (one.output for one in pending)
        if not exchange.needs_grad[0]:
            ctx.mark_non_differentiable(rows_QD)
        return rows_QD, metadata_B2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # What comes in has already left; see _DispatchFinish.
        rows, weights = (None if m is None else m.wait() for m in ctx.exchange.gradients)
        ctx.exchange.gradients = []
        return rows, weights, None, None


class _DispatchFinish(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_QD: Tensor, metadata_B2: Tensor, exchange: TokenExchange
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.exchange = exchange
        weights_B, row_offsets_B = (part.contiguous() for part in metadata_B2.unbind(1))
        row_offsets_B = row_offsets_B.view(_INTEGER[row_offsets_B.dtype]).long()
        ctx.mark_non_differentiable(row_offsets_B)
        return rows_QD, weights_B, row_offsets_B

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_rows_QD: Tensor, grad_weights_B: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        exchange = ctx.exchange
        needs_rows, needs_weights = exchange.needs_grad
        exchange.gradients = [
            exchange.rows.start(grad_rows_QD, back=True) if needs_rows else None,
            exchange.assignments.start(grad_weights_B, back=True) if needs_weights else None,
        ]
        # Autograd wants gradients of the inputs' shapes here; _DispatchStart gives the real ones.
        return grad_rows_QD, grad_weights_B[:, None].expand(-1, 2), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_QD: Tensor, rows: UnevenAllToAll) -> Tensor:
        ctx.rows = rows
        return rows.start(rows_QD, back=True).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.start(grad_PD).wait(), None
