"""Which samples each rank sees in which step: shuffled, endless, resumable in O(1)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from types import ModuleType

import numpy as np

from gemoe_ds.data.collate import Batch, Collator, Encoded
from gemoe_ds.data.order import LengthGroupedOrder, Selection
from gemoe_ds.data.sample import SampleFolder
from gemoe_ds.errors import DataError

ENDLESS = 2**40  # samples


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
    """Micro-batches that are made before their step, or being made."""
    return 2 * num_workers


def check_number(samples: SampleFolder, taken: int, micro_batch_size: int) -> None:
    """DataError if the samples that are taken are less than a micro-batch."""
    if taken < micro_batch_size:
        of = "" if taken == len(samples) else f" of {len(samples)}"
        raise DataError(
            f"{samples.path}: {taken}{of} samples do not fill "
            f"train.micro_batch_size={micro_batch_size}"
        )


class _Source:
    """What grain reads: the encoded sample, or padding; one of those taken, or in their `order`."""

    def __init__(
        self,
        samples: SampleFolder,
        collator: Collator,
        row_M: Sequence[int] | np.ndarray,
        order: LengthGroupedOrder | None,
    ) -> None:
        self.samples = samples
        self.collator = collator
        self.row_M = row_M
        self.order = order

    def __len__(self) -> int:
        return ENDLESS if self.order else len(self.row_M)

    def __getitem__(self, index: int) -> Encoded:
        row = int(self.row_M[self.order[int(index)] if self.order else int(index)])
        return self.collator.encode_or_leave_out(row, self.samples[row])


class TrainStream:
    """Iterator over steps; each item is this rank's `accumulation` micro-batches.

    The samples stand in one endless shuffled order. Micro-batch a of rank r in step s is block
    (s * accumulation + a) * world + r of `micro_batch_size` samples: the global batch does not
    depend on how it is split, and two ranks see what one rank with twice the accumulation sees. A
    sample that cannot be used is padding in its place.

    `selection` may leave samples out, and give a global batch samples of like length
    (`LengthGroupedOrder`).
    """

    def __init__(
        self,
        samples: SampleFolder,
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
    ) -> None:
        """`pinned`: see `Batch.pinned`, for a GPU."""
        selection = selection or Selection()
        row_M = range(len(samples)) if selection.row_M is None else selection.row_M
        check_number(samples, len(row_M), micro_batch_size)
        grain = _import_grain()
        order = None
        if selection.length_M is not None:
            size = micro_batch_size * accumulation * world
            order = LengthGroupedOrder(selection.length_M, seed=seed, global_batch_size=size)
        endless = grain.MapDataset.source(_Source(samples, collator, row_M, order))

        def batch_of(encoded: Sequence[Encoded]) -> Batch:
            batch = collator.batch(encoded)
            return batch.pinned() if pinned else batch

        if order is None:
            # Shuffled anew in every pass. Not repeat(None): a slice of that overflows.
            endless = endless.seed(seed).shuffle().repeat(ENDLESS // len(row_M))
        blocks = endless.batch(micro_batch_size, batch_fn=batch_of)[rank::world]
        options = grain.ReadOptions(num_workers, num_read_ahead(num_workers))
        self._blocks = iter(blocks.to_iter_dataset(options))
        self._blocks.set_state({"next_index": start_step * accumulation})
        self.accumulation = accumulation

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        return [next(self._blocks) for _ in range(self.accumulation)]


class EvalStream:
    """Every sample once, over the ranks. All ranks iterate equally often: one that has run out of
    samples gets None, because expert-parallel ranks must run the model together."""

    def __init__(
        self,
        samples: SampleFolder,
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
