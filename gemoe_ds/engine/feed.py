"""Micro-batches on their way to the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from gemoe_ds.data.collate import Batch


def on_device(batches: Sequence[Batch], device: torch.device) -> Iterator[Batch]:
    """Each on `device`; on a GPU the next one is copied while the one that is given out is used.

    Only pinned memory is copied beside the computation (`Batch.pinned`). NOT run on a GPU.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    if not batches:
        return
    side = torch.cuda.Stream(device)

    def sent(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        with torch.cuda.stream(side):
            moved = batch.to(device)
            return moved, side.record_event()

    ahead = sent(batches[0])
    for following in (*batches[1:], None):
        batch, is_there = ahead
        if following is not None:
            ahead = sent(following)
        computing = torch.cuda.current_stream(device)
        computing.wait_event(is_there)
        for tensor in batch.tensors():
            tensor.record_stream(computing)  # not given to the side stream while it is read
        yield batch
