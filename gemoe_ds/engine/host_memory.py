"""Weights that every rank of a host holds alike, once in its memory.

What experts leave of a model (embeddings, attention, the vision tower) is the same on every rank,
and frozen. On CPUs, and wherever weights wait for their way to a GPU, a host of R ranks would hold
it R times. Here the first rank of a host makes a file without a name (Linux's memfd, memory that
belongs to no file system and has no limit but the host's), and the others map the same pages. The
kernel frees them with the last mapping: tensor by tensor when ZeRO 3 takes its parts, or as the
weights move to a GPU; all of them when the processes end, however they do.

The pages can be written by all. Nobody does once they are filled: what trains is never kept here.
(DeepSpeed broadcasts parameters when an engine is built, and then writes what is there already.)
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gemoe_ds.engine.world import World, gather_objects
from gemoe_ds.hf_io.allocator import WeightAllocator
from gemoe_ds.hf_io.key_rules import Shape

_FILES_AT_ONCE = 64  # open in a process, of 1024 as a rule


class HostMemory(WeightAllocator):
    """Common to these ranks. All ranks of the world make the same calls, whatever their host."""

    def __init__(self, ranks: list[int], world: World) -> None:
        self.ranks, self.world = ranks, world
        self.rank, self.num_ranks = ranks.index(world.rank), len(ranks)

    @classmethod
    def of(cls, world: World) -> HostMemory:
        """Common to as many as can have it: all ranks of a host, or each rank alone. Collective."""
        hosts = gather_objects(_this_host())
        memory = cls([r for r, host in enumerate(hosts) if host == hosts[world.rank]], world)
        try:
            memory.allocate([(1,)], torch.uint8)
            works = True
        except OSError:
            works = False
        answers = gather_objects(works)
        return memory if all(answers[r] for r in memory.ranks) else cls([world.rank], world)

    def allocate(self, shapes: Sequence[Shape], dtype: torch.dtype) -> list[Tensor]:
        """Raises OSError, on the ranks that it happens to, after all have done their part."""
        tensors = []
        for first in range(0, len(shapes), _FILES_AT_ONCE):
            tensors += self._allocate(shapes[first : first + _FILES_AT_ONCE], dtype)
        return tensors

    def _allocate(self, shapes: Sequence[Shape], dtype: torch.dtype) -> list[Tensor]:
        files: list[int] = []
        tensors: list[Tensor] = []
        problem: Exception | None = None
        is_common = self.num_ranks > 1
        try:
            if is_common and self.rank == 0:
                for shape in shapes:
                    files.append(os.memfd_create("weights", os.MFD_CLOEXEC))
                    os.truncate(files[-1], math.prod(shape) * dtype.itemsize)
        except OSError as error:
            problem = error
        paths = gather_objects([f"/proc/{os.getpid()}/fd/{file}" for file in files])[self.ranks[0]]
        try:
            if is_common:
                tensors = [_mapped(*of, dtype) for of in zip(paths, shapes, strict=True)]
            else:
                tensors = super().allocate(shapes, dtype)
        except (OSError, ValueError) as error:  # ValueError: the first rank has fewer
            problem = problem or error
        gather_objects(None)  # all have opened them
        for file in files:
            os.close(file)
        if problem:
            raise OSError(f"memory common to ranks {self.ranks}: {problem}") from problem
        return tensors

    def first_error(self, problem: str | None) -> str | None:
        return next(filter(None, gather_objects(problem)), None)


def _this_host() -> str:
    """The same on ranks that may find each other under /proc; never the same on others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino} {os.getuid()}"
    except OSError:
        return secrets.token_hex(16)


def _mapped(path: str, shape: Shape, dtype: torch.dtype) -> Tensor:
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        pages = mmap.mmap(file, math.prod(shape) * dtype.itemsize)  # lives as long as its tensor
    finally:
        os.close(file)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
