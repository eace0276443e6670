"""How sure the gates were, sample by sample: `samples.npz`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Samples:
    """Means over the tokens of a sample and all MoE layers. S samples, sorted by row."""

    row_S: np.ndarray  # int32: row of the data
    entropy_S: np.ndarray  # float32: gating entropy, bits
    mass_S: np.ndarray  # float32: of the softmax of the gate, what the backbone's own k best hold

    @classmethod
    def of(cls, found: Mapping[int, tuple[float, float]]) -> Samples:
        """From entropy and mass by row."""
        rows = sorted(found)
        entropy_S, mass_S = np.array([found[row] for row in rows], np.float32).reshape(-1, 2).T
        return cls(np.array(rows, np.int32), entropy_S, mass_S)

    def check(self) -> None:
        """ValueError unless it is whole."""
        shapes = {name: array.shape for name, array in vars(self).items()}
        if len(set(shapes.values())) > 1 or self.row_S.ndim != 1:
            raise ValueError(f"arrays of different lengths: {shapes}")
        if self.row_S.dtype.kind != "i" or (np.diff(self.row_S) <= 0).any():
            raise ValueError("row_S must be integers, sorted, each once")
        if not all(np.isfinite(a).all() for a in (self.entropy_S, self.mass_S)):
            raise ValueError("a value is not finite")
