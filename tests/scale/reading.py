"""How many bytes of a folder are read, by all ranks of so many hosts: the loader's own decisions.

The loader runs for every rank of every host, on headers of OLMoE's true shape; nothing is read, and
what it would read is added up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemoe_ds.hf_io.allocator import Peers, Sharing, WeightAllocator
from gemoe_ds.hf_io.key_rules import StoredSlice
from gemoe_ds.hf_io.loader import Weights
from gemoe_ds.hf_io.safetensors_reader import open_stored
from gemoe_ds.hf_io.targets import Target
from gemoe_ds.models.backbone import Backbone

RANKS = 8  # of a host, which together hold all experts


class _Some(Peers):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


class _Hosts(WeightAllocator):
    """What engine/read_once.py tells one rank of `hosts` hosts."""

    def __init__(self, host: int, rank: int, hosts: int, *, once: bool) -> None:
        self.host, self.rank, self.hosts, self.once = host, rank, hosts, once
        self.num_ranks = RANKS

    @contextmanager
    def sharing(self, rows: str) -> Iterator[Sharing]:
        part = (self.rank, RANKS)
        if not self.once:
            yield Sharing(part=part)
            return
        everyone = _Some(self.host * RANKS + self.rank, self.hosts * RANKS)
        equal = [_Some(self.host, self.hosts) for _ in range(2)]
        yield Sharing(everyone, *equal, part)


class _Counted(Weights):
    """Adds up what would be read."""

    num_bytes = 0

    def _read(self, slices: list[StoredSlice], targets: Mapping[str, Target]) -> Iterator[None]:
        for piece in slices:
            self.num_bytes += targets[piece.name].num_bytes(piece, self.stored[piece.key])
            yield


def bytes_read(name: str, folder: Path, hosts: int, *, once: bool) -> int:
    """By all ranks of so many hosts, of a folder of this backbone in bfloat16."""
    backbone = Backbone.named(name)(Backbone.named(name).Config())
    hf = Backbone.named(name).published()
    weights = _Counted(folder, backbone.keys, hf, backbone.may_lack)
    experts = {f"{b.path}.{name}" for b in backbone.moe_blocks(hf) for name in b.names[1:]}
    gates = {f"{b.path}.{b.names[0]}" for b in backbone.moe_blocks(hf)}
    for host in range(hosts):
        for rank in range(RANKS):
            memory = _Hosts(host, rank, hosts, once=once)
            rest = {n: s for n, s in weights.shapes.items() if n not in gates}
            for shapes in ({n: weights.shapes[n] for n in gates}, rest):
                weights.fill({n: _target(n, s, experts, rank) for n, s in shapes.items()}, memory)
    return weights.num_bytes


def stored_bytes(folder: Path) -> int:
    return sum(tensor.num_bytes for tensor in open_stored(folder).values())


def _target(name: str, shape: tuple[int, ...], experts: set[str], rank: int) -> Target:
    """Memory for a tensor or its rows, which takes none."""

    def nothing(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device="meta")

    if name not in experts:
        is_common = 2 * torch.Size(shape).numel() >= 2**16
        return Target(nothing(*shape), shape, is_common=is_common)
    number = shape[0] // RANKS
    return Target(nothing(number, *shape[1:]), shape, rank * number)


def row(name: str, folder: Path, hosts: int) -> dict[str, Any]:
    """Bytes read of the bytes that are stored; each host for itself reads them all."""
    stored = stored_bytes(folder)
    once = bytes_read(name, folder, hosts, once=True) / stored
    return {"backbone": name, "hosts": hosts, "folder_bytes": stored, "read": once}
