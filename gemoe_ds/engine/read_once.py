"""The weights of a folder come over the network once, however many hosts keep them.

One rank reads a file, and broadcasts what is in it to those that keep the same: whole tensors to
every rank, the part of a host's common memory that one of its ranks fills to the one rank of every
other host that fills the same part, rows of experts to the ranks with the same experts. Ranks read
ahead, straight into the memory that keeps the weights; there are no other buffers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gemoe_ds.config import RunConfig
from gemoe_ds.engine.host_memory import HostMemory
from gemoe_ds.engine.world import World, gather_objects, waiting
from gemoe_ds.errors import CheckpointError
from gemoe_ds.files import sha256_of
from gemoe_ds.hf_io.allocator import LOCAL, Peers, Sharing, WeightAllocator

_NETWORK = set(
    "9p afs beegfs ceph cifs gfs2 glusterfs gpfs lustre ncpfs nfs nfs4 ocfs2 panfs pvfs2 smb3 "
    "smbfs virtiofs wekafs".split()
)
_LOCAL_FUSE = {"fuse.fuse-overlayfs", "fuse.ntfs-3g", "fuse.exfat"}
_MOUNTS = Path("/proc/self/mounts")


def weight_memory(config: RunConfig, world: World) -> WeightAllocator:
    """Where a run keeps its weights and how it reads them, as `model.read` says. Collective."""
    if world.size == 1:
        return LOCAL
    memory = HostMemory.of(world)
    reads_once = config.model.read == "once"
    if config.model.read == "auto" and config.model.checkpoint:
        reads_once = any(gather_objects(is_on_network(Path(config.model.checkpoint))))
    return ReadOnce(memory.ranks, world) if reads_once else memory


def sha256_over_ranks(files: Iterable[Path], world: World) -> dict[Path, str]:
    """Of each file, which one rank reads: on the host that reads its weights, too. Collective.

    Raises CheckpointError on every rank if a rank cannot read one.
    """
    every, found = sorted(files), {}
    try:
        for number, path in enumerate(every):
            if number * world.size // len(every) == world.rank:
                found[path] = sha256_of(path)
        problem = None
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}"
    told = gather_objects((found, problem))
    for rank, (_, problem) in enumerate(told):
        if problem:
            raise CheckpointError(f"rank {rank} cannot read {problem}")
    return {path: checksum for some, _ in told for path, checksum in some.items()}


def is_on_network(folder: Path, mounts: Path = _MOUNTS) -> bool:
    """Whether what is in a folder comes from other machines, as far as the system tells."""
    files = [path.resolve() for path in folder.glob("*.safetensors")] or [folder.resolve()]
    try:
        rows = [line.split(" ")[1:3] for line in mounts.read_text().splitlines()]
    except OSError:
        return False
    kinds = {place.encode().decode("unicode_escape"): kind for place, kind in rows}
    places = [
        next(p for p in (file, *file.parents) if str(p) in kinds or p == p.parent) for file in files
    ]
    found = {kinds.get(str(place), "") for place in places}
    return any(k in _NETWORK or (k[:5] == "fuse." and k not in _LOCAL_FUSE) for k in found)


class ReadOnce(HostMemory):
    """Memory common to the ranks of a host; files are read by one rank of all hosts."""

    note = "weights: each file is read by one host, and sent to the others"

    @contextmanager
    def sharing(self, rows: str) -> Iterator[Sharing]:
        told = gather_objects((self.ranks[0], rows))
        hosts, equal = (list(_alike(kind).values()) for kind in zip(*told, strict=True))
        num_parts = min(map(len, hosts))  # the smallest host says how many fill its memory
        parts = [[host[part] for host in hosts] for part in range(num_parts)]
        everyone = [[*range(len(told))]]
        whole, shard, common = (_Group.of(g, self.world) for g in (everyone, equal, parts))
        try:
            yield Sharing(whole, shard, common, (self.rank, num_parts))
        finally:
            shard.end()
            common.end()


@contextmanager
def peers_by(value: Hashable, world: World) -> Iterator[Peers]:
    """The ranks that give an equal value, until the end of the block. Collective."""
    group = _Group.of(list(_alike(gather_objects(value)).values()), world)
    try:
        yield group
    finally:
        group.end()


def _alike(of_ranks: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """The ranks of each value."""
    ranks: dict[Hashable, list[int]] = {}
    for rank, value in enumerate(of_ranks):
        ranks.setdefault(value, []).append(rank)
    return ranks


class _Group(Peers):
    """Ranks of one group of gloo, or all of them in torch's own."""

    def __init__(self, ranks: list[int], world: World, handle: Any) -> None:
        self.ranks, self.handle = ranks, handle
        self.rank, self.size = ranks.index(world.rank), len(ranks)

    @classmethod
    def of(cls, groups: list[list[int]], world: World) -> _Group:
        """That of this rank, which is alone if it is in none. Collective."""
        mine = cls([world.rank], world, None)
        for ranks in groups:
            makes_one = 1 < len(ranks) < world.size
            handle = dist.new_group(ranks, backend="gloo") if makes_one else None
            if world.rank in ranks:
                mine = cls(ranks, world, handle)
        return mine

    def broadcast(self, tensor: Tensor, source: int) -> None:
        if self.size == 1 or not tensor.numel():
            return
        whole = tensor.detach().contiguous()
        with waiting("broadcast"):
            dist.broadcast(whole.view(-1).view(torch.uint8), self.ranks[source], group=self.handle)
        if whole.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(whole)

    def end(self) -> None:
        if self.handle is not None:
            dist.destroy_process_group(self.handle)
