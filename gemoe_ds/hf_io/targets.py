"""Where pieces of a folder go: memory of a parameter, or what keeps them in another form."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemoe_ds.hf_io.key_rules import EXCHANGED, Shape, StoredSlice
from gemoe_ds.hf_io.quantised_tensor import QuantisedTensor
from gemoe_ds.hf_io.safetensors_reader import StoredTensor
from gemoe_ds.moe.experts.quantised import QuantisedWeight


@dataclass(frozen=True)
class Target:
    """Memory for a parameter of this (whole) shape, or for its rows from `first_row` on."""

    tensor: Tensor
    shape: Shape
    first_row: int = 0
    is_common: bool = False  # several ranks have this memory; each reads a part

    @property
    def is_some_rows(self) -> bool:
        return self.tensor.shape != self.shape

    def holds(self, piece: StoredSlice) -> bool:
        rows = range(self.first_row, self.first_row + len(self.tensor)) if self.shape else ()
        return piece.row is None or piece.row in rows

    def num_bytes(self, piece: StoredSlice, stored: StoredTensor) -> int:
        """Of what is read for a piece."""
        return self.view(piece, stored).nbytes

    def view(self, piece: StoredSlice, stored: StoredTensor) -> Tensor:
        """The memory that a piece is read into; the same until it is `done`."""
        assert piece.row is not None or self.tensor.shape == self.shape, piece
        return piece.ours(self.tensor.detach(), self.first_row)

    def read(self, piece: StoredSlice, stored: StoredTensor) -> str | None:
        """Fill the view; or what is wrong with what is in it."""
        view, rows = self.view(piece, stored), piece.stored_rows(stored.shape)
        if piece.rule.rearrange is None:
            stored.read_into(view[None] if piece.rule.by_row else view, rows.start if rows else 0)
        else:
            view.copy_(piece.to_ours(stored.read(rows)))
        return problem_of(view)

    def done(self, piece: StoredSlice, stored: StoredTensor) -> None:
        """Its values are there."""


@dataclass(frozen=True)
class PassedOn(Target):
    """What is kept in few bits: `weight` gets a piece once it is there, in the dtype that it is
    stored in, or as codes and scales if it is stored in the weight's own format.

    `tensor` is on the meta device.
    """

    weight: QuantisedWeight = field(kw_only=True)
    _there: dict[int, Tensor] = field(default_factory=dict, init=False)

    def num_bytes(self, piece: StoredSlice, stored: StoredTensor) -> int:
        if same := self._same(piece, stored):
            return same.bytes_of(piece.stored_rows(stored.shape))
        return super().view(piece, stored).numel() * stored.dtype.itemsize

    def view(self, piece: StoredSlice, stored: StoredTensor) -> Tensor:
        if id(piece) not in self._there:
            if same := self._same(piece, stored):
                size = same.bytes_of(piece.stored_rows(stored.shape))
                self._there[id(piece)] = torch.empty(size, dtype=torch.uint8)
            else:
                shape = super().view(piece, stored).shape
                self._there[id(piece)] = torch.empty(shape, dtype=stored.dtype)
        return self._there[id(piece)]

    def read(self, piece: StoredSlice, stored: StoredTensor) -> str | None:
        same, rows = self._same(piece, stored), piece.stored_rows(stored.shape)
        if same is None:
            return super().read(piece, stored)
        view = self.view(piece, stored)
        same.read_stored(view, rows)
        return same.problem_of(view, rows)

    def done(self, piece: StoredSlice, stored: StoredTensor) -> None:
        there, same = self._there.pop(id(piece)), self._same(piece, stored)

        def select(tensor: Tensor) -> Tensor:  # of what begins with the same dimensions
            return piece.ours(tensor, self.first_row)

        if same is None:
            self.weight.put(select, there)
        else:
            rows = piece.stored_rows(stored.shape)
            self.weight.put_stored(select, *same.parts(there, rows, piece.to_ours))

    def _same(self, piece: StoredSlice, stored: StoredTensor) -> QuantisedTensor | None:
        """What is stored, if it is kept as it is."""
        if not isinstance(stored, QuantisedTensor) or stored.format_name != self.weight.name:
            return None
        how = piece.rule.rearrange
        return stored if how is None or (how == EXCHANGED and stored.format.square) else None


def problem_of(weight: Tensor) -> str | None:
    """What no trained weight is: not finite, or a matrix of nothing but zeros.

    One pass over what has just come through the cache: a twentieth of the time to read.
    """
    if not weight.numel():
        return None
    low, high = (bound.item() for bound in weight.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        return "holds NaN or infinite numbers"
    return "holds nothing but zeros" if low == high == 0 and weight.dim() > 1 else None
