"""Tensors of a checkpoint are read when asked for, and by one rank for all that keep them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

from gemoe_ds.checkpoint.manifest import WEIGHTS, Checkpoint, num_bytes
from gemoe_ds.checkpoint.shards import pieces_of
from gemoe_ds.hf_io.allocator import Peers

_KEPT = 2  # parameters: the experts of a layer are asked for one by one, out of two


class TrainedTensors(Mapping[str, Tensor]):
    """The trained parameters of a checkpoint by name, float32 on the CPU; experts stacked."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.pieces = checkpoint, pieces_of(checkpoint.keys(WEIGHTS))
        self._read = lru_cache(_KEPT)(self._read_one)

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def _read_one(self, name: str) -> Tensor:
        keys = self.pieces[name]
        found = dict(self.checkpoint.tensors(WEIGHTS, set(keys)))
        return found[name] if keys == [name] else torch.stack([found[key] for key in keys])

    def __contains__(self, name: object) -> bool:
        return name in self.pieces

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)


def read_together(checkpoint: Checkpoint, keys: Sequence[str], peers: Peers) -> Iterator[Tensor]:
    """These tensors, in this order, on all peers: one of them reads a tensor and sends it.

    Each reads an equal part of the bytes, its next tensor while others send theirs. Collective.
    """
    entries = checkpoint.manifest["tensors"]
    readers = _readers([num_bytes(entries[key]) for key in keys], peers.size)
    mine = iter([key for key, reader in zip(keys, readers, strict=True) if reader == peers.rank])
    with checkpoint.reading() as read, ThreadPoolExecutor(1) as ahead:

        def next_one() -> Future[Tensor] | None:
            key = next(mine, None)
            return ahead.submit(lambda: read(key).clone()) if key is not None else None

        coming = next_one()
        for key, reader in zip(keys, readers, strict=True):
            if reader == peers.rank:
                assert coming is not None
                tensor = coming.result()
                coming = next_one()
            else:
                dtype = getattr(torch, entries[key]["dtype"])
                tensor = torch.empty(entries[key]["shape"], dtype=dtype)
            peers.broadcast(tensor, reader)
            yield tensor


def _readers(sizes: Sequence[int], num_peers: int) -> list[int]:
    """Who reads each: whoever has read the least so far, so that all read at the same time."""
    read = [0] * num_peers
    found = []
    for size in sizes:
        found.append(read.index(min(read)))
        read[found[-1]] += size
    return found
