"""The sample at every position of a run's one endless list, from seed, lengths and settings alone.

An order knows neither ranks nor micro-batches, and a position costs O(1), but for the first one of
its epoch. Shapes: M samples that are taken, P positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

CHUNK = 200  # global batches whose samples are sorted together, at most
# What random numbers are for; those of the passes of a mixture's part p are for _PART + p.
_PASS, _CHUNK, _EPOCH, _PART = range(4)


@dataclass(frozen=True)
class Draws:
    """What an epoch takes of every part of a mixture, whose samples stand part after part."""

    sizes: tuple[int, ...]  # samples that there are
    drawn: tuple[int, ...]  # samples of an epoch

    @property
    def epoch_size(self) -> int:
        return sum(self.drawn)


@dataclass(frozen=True)
class Selection:
    """Of the samples of a run; the same on all ranks."""

    row_M: np.ndarray | None = None  # the rows that are taken; None: all
    length_M: np.ndarray | None = None  # tokens of each, to group or pack by; None: shuffled only
    draws: Draws | None = None  # of a mixture; None: all, once
    held_out_H: np.ndarray | None = None  # rows that are never trained on, if there are any
    row_tokens: int | None = None  # samples fill rows of so many tokens: see pack.py; None: one
    # sample a row


class Endless(Protocol):
    """A list of samples that never ends; it is shuffled anew in every epoch."""

    epoch_size: int

    def at(self, position_P: np.ndarray) -> np.ndarray:
        """The samples at these positions, int64 [P]."""


class Passes:
    """All samples in each epoch."""

    def __init__(self, number: int, *, seed: int, purpose: int = _PASS) -> None:
        self.epoch_size, self.seed, self.purpose = number, seed, purpose
        self._epoch = lru_cache(4)(self._shuffled)  # readers are a few steps apart

    def at(self, position_P: np.ndarray) -> np.ndarray:
        return _over_epochs(position_P, self.epoch_size, self._epoch)

    def _shuffled(self, epoch: int) -> np.ndarray:
        return _random(self.seed, epoch, self.purpose).permutation(self.epoch_size)


class MixedPasses:
    """So many of each part in each epoch, from where the last epoch has left that part.

    A part that is drawn by half gives one half of its samples in an epoch, and the other half in
    the next.
    """

    def __init__(self, draws: Draws, *, seed: int) -> None:
        self.draws, self.seed, self.epoch_size = draws, seed, draws.epoch_size
        self._parts = [
            Passes(size, seed=seed, purpose=_PART + part) for part, size in enumerate(draws.sizes)
        ]
        self._epoch = lru_cache(4)(self._shuffled)

    def at(self, position_P: np.ndarray) -> np.ndarray:
        return _over_epochs(position_P, self.epoch_size, self._epoch)

    def __getitem__(self, position: int) -> int:
        return int(self.at(np.array([position]))[0])

    def _shuffled(self, epoch: int) -> np.ndarray:
        drawn, before = [], 0
        for part, size, number in zip(self._parts, self.draws.sizes, self.draws.drawn, strict=True):
            drawn.append(before + part.at(np.arange(epoch * number, (epoch + 1) * number)))
            before += size
        return _random(self.seed, epoch, _EPOCH).permutation(np.concatenate(drawn))


class LengthGroupedOrder:
    """The samples of an endless list, those of like length in one step.

    The global batches that begin in an epoch of the list are divided into chunks. The samples of a
    chunk are sorted by length and cut into global batches again, which are shuffled. So the steps
    of an epoch see what they would see without it, and which samples a step has depends on neither
    the ranks nor the micro-batch size.
    """

    def __init__(
        self,
        length_M: np.ndarray,
        *,
        seed: int,
        global_batch_size: int,
        endless: Endless | None = None,
    ) -> None:
        """`endless`: of so many samples, by default their `Passes`."""
        self.length_M = length_M
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.endless = endless or Passes(len(length_M), seed=seed)
        self._chunk = lru_cache(4)(self._sorted_chunk)

    def __getitem__(self, position: int) -> int:
        batch, place = divmod(position, self.global_batch_size)
        first, end = self.chunk_of(batch)
        return int(self._chunk(first, end)[(batch - first) * self.global_batch_size + place])

    def epoch(self, number: int) -> np.ndarray:
        """The samples of the global batches that begin in an epoch."""
        first, end = self._batches_of(number)
        chunks = []
        while first < end:
            chunks.append(self._chunk(*self.chunk_of(first)))
            first = self.chunk_of(first)[1]
        return np.concatenate(chunks)

    def chunk_of(self, batch: int) -> tuple[int, int]:
        """The global batches that are sorted with this one, from the first to before the end."""
        begin, end = self._batches_of(batch * self.global_batch_size // self.endless.epoch_size)
        chunks = -(-(end - begin) // CHUNK)
        chunk_size = -(-(end - begin) // chunks)
        first = begin + (batch - begin) // chunk_size * chunk_size
        return first, min(first + chunk_size, end)

    def _batches_of(self, epoch: int) -> tuple[int, int]:
        """The global batches that begin in it."""
        size, epoch_size = self.global_batch_size, self.endless.epoch_size
        return -(-epoch * epoch_size // size), -(-(epoch + 1) * epoch_size // size)

    def _sorted_chunk(self, first: int, end: int) -> np.ndarray:
        """Samples at its positions, [P]."""
        size = self.global_batch_size
        index_P = self.endless.at(np.arange(first * size, end * size))
        index_P = index_P[np.argsort(self.length_M[index_P], kind="stable")]
        batches = index_P.reshape(-1, size)
        return _random(self.seed, first, _CHUNK).permutation(batches).reshape(-1)


def endless_of(selection: Selection, number: int, seed: int) -> Endless:
    """The list of a mixture, or of `number` samples."""
    if selection.draws:
        return MixedPasses(selection.draws, seed=seed)
    return Passes(number, seed=seed)


def draws_of(
    sizes: Sequence[int], repeats: Sequence[float], weights: Sequence[float] | None = None
) -> Draws:
    """An epoch takes of each part `repeat` times what there is; of one that is small, one sample.

    With `weights` it takes as many samples as there are in all, in these shares; what is left by
    rounding down goes to those that lost most.
    """
    if weights is None:
        drawn = [max(1, round(n * repeat)) for n, repeat in zip(sizes, repeats, strict=True)]
        return Draws(tuple(sizes), tuple(drawn))
    exact = np.array(weights, np.float64) / sum(weights) * sum(sizes)
    drawn_P = np.floor(exact).astype(np.int64)
    lost = np.argsort(-(exact - drawn_P), kind="stable")[: sum(sizes) - drawn_P.sum()]
    drawn_P[lost] += 1
    return Draws(tuple(sizes), tuple(drawn_P.tolist()))


def _over_epochs(
    position_P: np.ndarray, size: int, epoch_of: Callable[[int], np.ndarray]
) -> np.ndarray:
    """What stands at positions of a list of epochs of this size, each of which can be asked for."""
    epoch_P, place_P = np.divmod(position_P, size)
    found_P = np.empty(len(position_P), np.int64)
    for epoch in np.unique(epoch_P):
        is_there_P = epoch_P == epoch
        found_P[is_there_P] = epoch_of(int(epoch))[place_P[is_there_P]]
    return found_P


def _random(seed: int, number: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, number, purpose])
