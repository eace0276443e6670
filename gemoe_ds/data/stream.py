"""Which samples each rank sees in which step: shuffled, endless, resumable in O(1)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Protocol

import numpy as np

from gemoe_ds.data.collate import Batch, Collator, Encoded
from gemoe_ds.data.mixture import SampleList
from gemoe_ds.data.order import LengthGroupedOrder, MixedPasses, Selection
from gemoe_ds.data.pack import joined, packed_order
from gemoe_ds.data.prefetch import PREFETCH_BYTES, Prefetch
from gemoe_ds.errors import DataError

ENDLESS = 2**40  # samples


class Order(Protocol):
    """Of samples without end."""

    def __getitem__(self, position: int) -> int:
        """The one at this position."""


def _import_grain() -> ModuleType:
    """Without its warning that jax is missing, which nothing here would use."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import grain
    finally:
        logging.disable(before)
    return grain


def num_read_ahead(num_workers: int) -> int:
    """Micro-batches that are made before their step, or being made, at most."""
    return 2 * num_workers


def check_number(samples: SampleList, taken: int, micro_batch_size: int) -> None:
    """DataError if the samples that are taken are less than a micro-batch."""
    if taken < micro_batch_size:
        of = "" if taken == len(samples) else f" of {len(samples)}"
        raise DataError(
            f"{samples.path}: {taken}{of} samples do not fill "
            f"train.micro_batch_size={micro_batch_size}"
        )


def order_of(selection: Selection, number: int, *, seed: int, global_batch_size: int) -> Order:
    """Of `number` samples that are taken."""
    mixed = MixedPasses(selection.draws, seed=seed) if selection.draws else None
    if selection.length_M is not None:
        return LengthGroupedOrder(
            selection.length_M, seed=seed, global_batch_size=global_batch_size, endless=mixed
        )
    if mixed:
        return mixed
    # Shuffled anew in every pass. Not repeat(None): a slice of that overflows.
    shuffled = _import_grain().MapDataset.range(number).seed(seed).shuffle()
    endless: Order = shuffled.repeat(ENDLESS // number)
    return endless


class TrainStream:
    """Iterator over steps; each item is this rank's `accumulation` micro-batches.

    The samples stand in one endless shuffled order. Micro-batch a of rank r in step s is block
    (s * accumulation + a) * world + r of `micro_batch_size` samples: the global batch does not
    depend on how it is split, and two ranks see what one rank with twice the accumulation sees. A
    sample that cannot be used is padding in its place.

    `selection` may leave samples out, mix the parts of a mixture (`MixedPasses`), give a global
    batch samples of like length (`LengthGroupedOrder`), or fill rows with several samples, which
    then are what stands in the list (`PackedOrder`). Threads make micro-batches ahead of their
    step, `prefetch_bytes` of them at most (`Prefetch`).
    """

    def __init__(
        self,
        samples: SampleList,
        collator: Collator,
        *,
        seed: int,
        micro_batch_size: int,
        accumulation: int,
        rank: int,
        world: int,
        num_workers: int,
        start_step: int = 0,
        pinned: bool = False,
        selection: Selection | None = None,
        prefetch_bytes: int = PREFETCH_BYTES,
        expected_bytes: int | None = None,
    ) -> None:
        """`pinned`: see `Batch.pinned`, for a GPU. `expected_bytes`: of the largest micro-batch."""
        selection = selection or Selection()
        row_M: Sequence[int] | np.ndarray
        row_M = range(len(samples)) if selection.row_M is None else selection.row_M
        check_number(samples, len(row_M), micro_batch_size)
        size = micro_batch_size * accumulation * world
        encoded_at = _encoded_at(selection, row_M, samples, collator, seed, size)

        def batch_of(number: int) -> Batch:
            first = (number * world + rank) * micro_batch_size
            batch = collator.batch([encoded_at(first + place) for place in range(micro_batch_size)])
            return batch.pinned() if pinned else batch

        self.accumulation = accumulation
        self._batches = Prefetch(
            batch_of,
            batch_bytes,
            num_workers=num_workers,
            max_items=num_read_ahead(num_workers),
            max_bytes=prefetch_bytes,
            start=start_step * accumulation,
            expected_bytes=expected_bytes,
        )

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        return [next(self._batches) for _ in range(self.accumulation)]

    def close(self) -> None:
        """Read nothing more."""
        self._batches.close()


def _encoded_at(
    selection: Selection,
    row_M: Sequence[int] | np.ndarray,
    samples: SampleList,
    collator: Collator,
    seed: int,
    global_batch_size: int,
) -> Callable[[int], Encoded]:
    """The sequence, or the row of several, at a position of the endless list."""

    def encoded(index: int) -> Encoded:
        row = int(row_M[index])
        return collator.encode_or_leave_out(row, samples[row])

    if selection.row_tokens is None:
        order = order_of(selection, len(row_M), seed=seed, global_batch_size=global_batch_size)
        return lambda position: encoded(order[position])
    packed = packed_order(selection, seed=seed, global_batch_size=global_batch_size)
    return lambda position: joined([encoded(index) for index in packed[position].tolist()])


def batch_bytes(batch: Batch) -> int:
    """What its tensors hold."""
    of_tokens = (batch.input_ids_BS, batch.labels_BS, batch.is_valid_BS, batch.is_vision_BS)
    packed = () if batch.document_BS is None else (batch.document_BS,)
    tensors = (*batch.images.values(), *of_tokens, batch.turn_BS, *packed)
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


class EvalStream:
    """Every sample once, over the ranks. All ranks iterate equally often: one that has run out of
    samples gets None, because expert-parallel ranks must run the model together."""

    def __init__(
        self,
        samples: SampleList,
        collator: Collator,
        *,
        batch: int,
        rank: int,
        world: int,
        limit: int | None = None,
        prompts: bool = False,
    ) -> None:
        """`limit`: the first so many samples only; `prompts`: without their last answers."""
        self.samples = samples
        self.prompts = prompts
        self.collator = collator
        number = min(len(samples), limit or len(samples))
        blocks = [range(i, min(i + batch, number)) for i in range(0, number, batch)]
        self._mine: Sequence[range] = blocks[rank::world]
        self._length = -(-len(blocks) // world)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch | None]:
        for index in range(self._length):
            if index >= len(self._mine):
                yield None
                continue
            rows = self._mine[index]
            encoded = [
                self.collator.encode_or_leave_out(row, self.samples[row], prompt=self.prompts)
                for row in rows
            ]
            yield self.collator.batch(encoded, left=self.prompts)
