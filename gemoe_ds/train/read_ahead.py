"""How much host memory the images of micro-batches take that are read before their step."""

from __future__ import annotations

import tracemalloc

import numpy as np

from gemoe_ds.config import RunConfig
from gemoe_ds.data.collate import Batch, Collator
from gemoe_ds.data.images import shown_size
from gemoe_ds.data.mixture import SampleList
from gemoe_ds.data.sample import Sample
from gemoe_ds.data.stream import num_read_ahead

_DECODED = 2 * 4  # bytes a pixel: as Pillow decodes it, and the copy that is laid


def image_bytes(batch: Batch) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in batch.images.values())


def read_ahead(
    config: RunConfig,
    samples: SampleList,
    collator: Collator,
    largest: Batch,
    tokens_N: np.ndarray,
    num_ranks: int,
) -> int:
    """The step's own micro-batches, those that wait behind it or are being made, of images as large
    as they are on average and of `data.prefetch_bytes` at most, and what the reader threads need
    beside to make one each.

    `largest`: the micro-batch of the largest images; `tokens_N`: of every sample's images.
    """
    num_workers, size = config.data.num_workers, image_bytes(largest)
    largest_N = tokens_N[list(largest.rows)]
    average = size * (tokens_N.mean() / largest_N.mean() if largest_N.any() else 1.0)
    own = size + average * (config.accumulation_steps(num_ranks) - 1)
    waiting = min(average * num_read_ahead(num_workers), max(config.data.prefetch_bytes, size))
    at_once = min(num_workers, max(1, int(config.data.prefetch_bytes / max(size, 1))))
    row = largest.rows[0]
    making = _making_of(samples[row], row, collator) + size * (1 - 1 / len(largest.rows))
    return round(own + waiting + at_once * making)


def _making_of(sample: Sample, row: int, collator: Collator) -> int:
    """Bytes that the arrays of one sample take at most while it is encoded."""
    if not sample.images:
        return 0
    tracemalloc.start()
    try:
        collator.encode(row, sample)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    sizes = (shown_size(sample, place) for place in range(len(sample.images)))
    return most + _DECODED * max(width * height for width, height in sizes)
