"""Several samples in one row of a micro-batch, behind each other, so that hardly any of it is
padding. Each stays a sequence of its own: see `ModelInputs.document_BS`.

Which samples share a row follows from the seed, the epoch and the lengths alone. Shapes: M samples
that are taken, P places of an epoch, R rows of a plan.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gemoe_ds.data.collate import IGNORE, Encoded
from gemoe_ds.data.order import Endless, Selection, endless_of

CHUNK = 50  # global batches whose rows are filled together, about
_PACK = 2**20  # what random numbers are for: those of order.py are others


@dataclass(frozen=True)
class Plan:
    """The rows of one epoch. Row i has the samples from end i - 1 to end i."""

    sample_P: np.ndarray  # int64
    end_R: np.ndarray  # int64

    def __len__(self) -> int:
        return len(self.end_R)

    def __getitem__(self, row: int) -> np.ndarray:
        start = self.end_R[row - 1] if row else 0
        return self.sample_P[start : self.end_R[row]]


class PackedOrder:
    """The samples of the row at every position of one endless list of rows.

    An epoch of the samples is divided into chunks that fill about CHUNK global batches. The
    samples of a chunk fill rows of at most `max_length` tokens, the longest first and each where it
    leaves the least room (best-fit decreasing), and the rows are shuffled. The plan of an epoch is
    made when it is first asked for, in seconds for 500,000 samples; those before it are, too, for
    the number of their rows.
    """

    def __init__(
        self,
        length_M: np.ndarray,
        endless: Endless,
        *,
        max_length: int,
        seed: int,
        global_batch_size: int,
    ) -> None:
        self.length_M, self.endless, self.max_length = length_M, endless, max_length
        self.seed, self.global_batch_size = seed, global_batch_size
        self._starts = [0]  # rows before each epoch whose number is known
        self._plan = lru_cache(2)(self._planned)
        self._lock = threading.RLock()

    def __getitem__(self, position: int) -> np.ndarray:
        """Samples, int64."""
        with self._lock:
            while position >= self._starts[-1]:
                self._starts.append(self._starts[-1] + len(self.plan(len(self._starts) - 1)))
            epoch = int(np.searchsorted(self._starts, position, side="right")) - 1
            return self.plan(epoch)[position - self._starts[epoch]]

    def plan(self, epoch: int) -> Plan:
        with self._lock:
            return self._plan(epoch)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row of the first epoch, [R]."""
        plan = self.plan(0)
        start_R = np.concatenate([[0], plan.end_R[:-1]])
        return np.add.reduceat(self.length_M[plan.sample_P].astype(np.int64), start_R)

    def rows_of(self, epochs: float) -> int:
        """Rows of so many epochs; of a part of one as large a part of its rows."""
        whole, part = divmod(epochs, 1)
        rows = sum(len(self.plan(epoch)) for epoch in range(int(whole)))
        return rows + round(part * len(self.plan(int(whole)))) if part else rows

    def _planned(self, epoch: int) -> Plan:
        number = self.endless.epoch_size
        sample_P = self.endless.at(np.arange(epoch * number, (epoch + 1) * number))
        token_P = np.cumsum(self.length_M[sample_P].astype(np.int64))
        chunk_P = (token_P - 1) // (CHUNK * self.global_batch_size * self.max_length)
        random = np.random.default_rng([self.seed, epoch, _PACK])
        rows: list[list[int]] = []
        for some in np.split(sample_P, np.flatnonzero(np.diff(chunk_P)) + 1):
            filled = fill(self.length_M[some].tolist(), self.max_length)
            rows += [some[filled[row]].tolist() for row in random.permutation(len(filled))]
        sample_P = np.fromiter((sample for row in rows for sample in row), np.int64, number)
        return Plan(sample_P, np.cumsum([len(row) for row in rows]))


def packed_order(selection: Selection, *, seed: int, global_batch_size: int) -> PackedOrder:
    """Of a selection that is to be packed."""
    assert selection.length_M is not None and selection.row_tokens is not None
    length_M = selection.length_M
    return PackedOrder(
        length_M,
        endless_of(selection, len(length_M), seed),
        max_length=selection.row_tokens,
        seed=seed,
        global_batch_size=global_batch_size,
    )


def fill(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Rows of things of these lengths, by their numbers: best-fit decreasing, all within `room`."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(room + 1)]  # rows by the room that is left
    there = 0  # bit r: whether there is a row with r left
    for number in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[number]
        assert 0 < length <= room, f"{length} tokens in rows of {room}"
        fitting = there >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            row = with_room[left].pop()
            there ^= 0 if with_room[left] else 1 << left
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append(number)
        with_room[left - length].append(row)
        there |= 1 << (left - length)
    return rows


def joined(samples: Sequence[Encoded]) -> Encoded:
    """Samples without pictures as one row."""
    row = Encoded(samples[0].row, samples[0].id, parts=tuple(samples))
    for sample in samples:
        assert not sample.images, "rows with pictures are not packed"
        assert sample.labels[0] == IGNORE, "nothing predicts the first token of a sequence"
        row.input_ids += sample.input_ids
        row.labels += sample.labels
        row.turn += sample.turn
        row.is_vision += sample.is_vision
        row.feature += sample.feature
    return row
