"""Uneven all-to-alls under autograd, started early and waited for late.

A trip out has two ends, `depart` and `arrive`: what stands between them runs while the rows
travel. In the backward pass the order is reversed, and so is the trip: the gradient leaves where
the rows arrived, and is waited for where they departed. Autograd works off nodes in the reverse
order of their making, on every rank the same; so what ran between runs backward in between too.

Shapes: D model; P pairs sent, Q pairs received, A assignments sent, B received.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Work(Protocol):
    """A collective under way; `wait` returns when its output may be used."""

    def wait(self) -> Any: ...


# (output, input, output_splits, input_splits): the collective itself, started and not waited for
AllToAll = Callable[[Tensor, Tensor, list[int], list[int]], Work]

_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


class Exchange:
    """One uneven all-to-all of rows: how many go to and come from every rank."""

    def __init__(self, all_to_all: AllToAll, sent: list[int], received: list[int]) -> None:
        self.all_to_all, self.sent, self.received = all_to_all, sent, received

    def start(self, rows: Tensor, *, back: bool = False) -> Moving:
        give, take = (self.received, self.sent) if back else (self.sent, self.received)
        return Moving(self.all_to_all, rows.contiguous(), give, take)


class Moving:
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
class Departed:
    """Rows and metadata on the way out. The node of `depart` must not hold this: it would hold its
    own outputs, a cycle through C++ that nobody collects."""

    rows_QD: Tensor
    metadata_B2: Tensor
    moving: tuple[Moving, Moving]


class Trip:
    """Rows and their metadata on the way out, and their gradients on the way back."""

    def __init__(self, rows: Exchange, assignments: Exchange) -> None:
        self.rows, self.assignments = rows, assignments
        self.gradients: list[Moving | None] = []  # under way in the backward pass
        self.needs_grad = (False, False)

    def depart(self, rows_PD: Tensor, weights_A: Tensor, places_A: Tensor) -> Departed:
        """Start; the result is to be handed to `arrive`, and holds nothing before."""
        # a place is an integer in the bits of a float beside its weight: one exchange, not two
        places_A = places_A.to(_INTEGER[weights_A.dtype]).view(weights_A.dtype)
        metadata_A2 = torch.stack([weights_A.detach(), places_A], dim=1)
        moving = self.rows.start(rows_PD.detach()), self.assignments.start(metadata_A2)
        rows_QD, metadata_B2 = _Depart.apply(rows_PD, weights_A, moving, self)  # type: ignore[no-untyped-call]
        return Departed(rows_QD, metadata_B2, moving)

    def arrive(self, departed: Departed) -> tuple[Tensor, Tensor, Tensor]:
        """rows_QD, weights_B and places_B (int64), complete."""
        for moving in departed.moving:
            moving.wait()
        return _Arrive.apply(departed.rows_QD, departed.metadata_B2, self)  # type: ignore[no-untyped-call,no-any-return]

    def home(self, rows_QD: Tensor) -> Tensor:
        """Rows back to where theirs came from, complete, [P, D]."""
        return _Home.apply(rows_QD, self.rows)  # type: ignore[no-untyped-call,no-any-return]


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_PD: Tensor, weights_A: Tensor, moving: tuple[Moving, Moving], trip: Trip
    ) -> tuple[Tensor, Tensor]:
        ctx.trip = trip
        # follows from which parameters train: the same on every rank
        trip.needs_grad = ctx.needs_input_grad[:2]
        rows_QD, metadata_B2 = (one.output for one in moving)
        if not trip.needs_grad[0]:
            ctx.mark_non_differentiable(rows_QD)
        return rows_QD, metadata_B2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # What comes in has already left; see _Arrive.
        rows, weights = (None if m is None else m.wait() for m in ctx.trip.gradients)
        ctx.trip.gradients = []
        return rows, weights, None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_QD: Tensor, metadata_B2: Tensor, trip: Trip
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.trip = trip
        weights_B, places_B = (part.contiguous() for part in metadata_B2.unbind(1))
        places_B = places_B.view(_INTEGER[places_B.dtype]).long()
        ctx.mark_non_differentiable(places_B)
        return rows_QD, weights_B, places_B

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_rows_QD: Tensor, grad_weights_B: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        trip = ctx.trip
        needs_rows, needs_weights = trip.needs_grad
        trip.gradients = [
            trip.rows.start(grad_rows_QD, back=True) if needs_rows else None,
            trip.assignments.start(grad_weights_B, back=True) if needs_weights else None,
        ]
        # Autograd wants gradients of the inputs' shapes here; _Depart gives the real ones.
        return grad_rows_QD, grad_weights_B[:, None].expand(-1, 2), None


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_QD: Tensor, rows: Exchange) -> Tensor:
        ctx.rows = rows
        return rows.start(rows_QD, back=True).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.start(grad_PD).wait(), None
