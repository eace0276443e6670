"""Which samples a run takes, and the order in which micro-batches are hardly padded.

Shapes: N samples of the folder, M that are taken, P positions of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CHUNK = 50  # global batches whose samples are sorted together


@dataclass(frozen=True)
class Selection:
    """Of the samples of a folder; the same on all ranks."""

    row_M: np.ndarray | None = None  # the rows that are taken; None: all
    length_M: np.ndarray | None = None  # tokens of each, to group by; None: shuffled only


class LengthGroupedOrder:
    """The sample at every position of one endless list, from the seed and the lengths alone.

    The list is that of all samples, shuffled anew in every pass. Chunks of some global batches are
    sorted by length, cut into global batches again, and these are shuffled. So a step has samples
    of like length, and which they are depends on neither the ranks nor the micro-batch size. A
    position costs O(1), but for the first one of its pass and chunk.
    """

    def __init__(self, length_M: np.ndarray, *, seed: int, global_batch_size: int) -> None:
        self.length_M = length_M
        self.seed = seed
        self.global_batch_size = global_batch_size
        num_batches = max(1, min(CHUNK, len(length_M) // global_batch_size))
        self.chunk_size = num_batches * global_batch_size
        self.chunk = lru_cache(4)(self._sorted_chunk)  # readers are a few steps apart
        self._pass = lru_cache(4)(self._shuffled)

    def __getitem__(self, position: int) -> int:
        chunk, place = divmod(position, self.chunk_size)
        return int(self.chunk(chunk)[place])

    def _sorted_chunk(self, chunk: int) -> np.ndarray:
        """Samples at its positions, [P]."""
        start = chunk * self.chunk_size
        position_P = np.arange(start, start + self.chunk_size)
        pass_P, place_P = np.divmod(position_P, len(self.length_M))
        index_P = np.concatenate(
            [self._pass(int(number))[place_P[pass_P == number]] for number in np.unique(pass_P)]
        )
        index_P = index_P[np.argsort(self.length_M[index_P], kind="stable")]
        batches = index_P.reshape(-1, self.global_batch_size)
        return self._random(chunk, 1).permutation(batches).reshape(-1)

    def _shuffled(self, number: int) -> np.ndarray:
        """All samples in the order of a pass, int64 [M]."""
        return self._random(number, 0).permutation(len(self.length_M))

    def _random(self, number: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, number, purpose])
