"""One bit for every question of an evaluation, `questions.npz`: what paired comparisons need.

Shapes: Q questions, C kinds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True, eq=False)
class Questions:
    """Every question that was asked, by row of the data and turn in it, each one once."""

    row_Q: np.ndarray  # int32
    turn_Q: np.ndarray  # int16
    kind_Q: np.ndarray  # int16, an index into kinds_C
    kinds_C: np.ndarray  # names, sorted
    right_Q: np.ndarray  # bool

    @classmethod
    def of(cls, asked: Iterable[tuple[int, int, str, bool]]) -> Questions:
        """From (row, turn, kind, right) in any order: that of ranks and batches is forgotten."""
        rows, turns, names, right = zip(*asked, strict=True)
        return cls.sorted(rows, turns, range(len(names)), right, names)

    @classmethod
    def sorted(
        cls,
        row_Q: ArrayLike,
        turn_Q: ArrayLike,
        kind_Q: ArrayLike,
        right_Q: ArrayLike,
        kinds: ArrayLike,
    ) -> Questions:
        """From columns in any order; kind_Q is an index into `kinds`, which may repeat names."""
        kinds_C, place = np.unique(np.array(kinds, np.str_), return_inverse=True)
        order = np.lexsort((np.array(turn_Q), np.array(row_Q)))
        return cls(
            row_Q=np.array(row_Q, np.int32)[order],
            turn_Q=np.array(turn_Q, np.int16)[order],
            kind_Q=place[np.array(kind_Q, int)[order]].astype(np.int16),
            kinds_C=kinds_C,
            right_Q=np.array(right_Q, bool)[order],
        )

    @classmethod
    def joined(cls, parts: Sequence[Questions]) -> Questions:
        """Of several ranks."""
        starts = np.cumsum([0, *(len(part.kinds_C) for part in parts)])
        return cls.sorted(
            np.concatenate([part.row_Q for part in parts]),
            np.concatenate([part.turn_Q for part in parts]),
            np.concatenate([p.kind_Q + start for p, start in zip(parts, starts, strict=False)]),
            np.concatenate([part.right_Q for part in parts]),
            np.concatenate([part.kinds_C for part in parts]),
        )

    def check(self, asked: Mapping[str, int], accuracy: Mapping[str, float]) -> None:
        """ValueError unless it is whole and what a record counts by kind."""
        shapes = {name: array.shape for name, array in vars(self).items() if name != "kinds_C"}
        if len(set(shapes.values())) > 1 or self.row_Q.ndim != 1:
            raise ValueError(f"arrays of different lengths: {shapes}")
        if self.right_Q.dtype != bool or self.kinds_C.dtype.kind != "U" or self.kinds_C.ndim != 1:
            raise ValueError("right_Q must be bool and kinds_C text")
        if any(getattr(self, name).dtype.kind != "i" for name in ("row_Q", "turn_Q", "kind_Q")):
            raise ValueError("row_Q, turn_Q and kind_Q must be integers")
        place_Q = (self.row_Q.astype(np.int64) << 16) + self.turn_Q
        if (np.diff(place_Q) <= 0).any():
            raise ValueError("not sorted by row and turn, each once")
        num_kinds = len(self.kinds_C)
        if ((self.kind_Q < 0) | (self.kind_Q >= num_kinds)).any():
            raise ValueError(f"a kind is not one of {num_kinds}")
        kinds, right_Q = self.kinds_C.tolist(), self.right_Q
        asked_C = np.bincount(self.kind_Q, minlength=num_kinds)
        right_C = np.bincount(self.kind_Q[right_Q], minlength=num_kinds)
        if dict(zip(kinds, asked_C.tolist(), strict=True)) != asked or not np.allclose(
            right_C / asked_C, [accuracy[kind] for kind in kinds], rtol=0, atol=1e-9
        ):
            raise ValueError("other counts by kind than eval.json's")
