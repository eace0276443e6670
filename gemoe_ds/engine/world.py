"""Start and end the process group, however this process was launched."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from gemoe_ds.engine.adopt_launcher import adopt_launcher
from gemoe_ds.engine.gpu import settle_gpu
from gemoe_ds.engine.launcher_env import device_index, refuse_hidden_gpus
from gemoe_ds.engine.malloc import bound_kernel_caches, keep_freed_memory
from gemoe_ds.engine.rendezvous import init_process_group
from gemoe_ds.errors import ConfigError, GemoeError
from gemoe_ds.progress import PROGRESS

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all: `size` ranks, one device each."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


@contextmanager
def distributed() -> Iterator[World]:
    """Join the process group and leave it at the end.

    Under `deepspeed`, `torchrun`, `srun` or `mpirun` the ranks come from the launcher; a process
    started alone is a world of one, and leaves its environment and torch as they were.
    """
    if torch.distributed.is_initialized():
        raise ConfigError(
            "this process is in a process group already, and a run makes its own: call "
            "torch.distributed.destroy_process_group() before it"
        )
    start = adopt_launcher()
    before = {name: os.environ.get(name) for name in (*_ALONE, "MASTER_PORT", "LOCAL_RANK")}
    if start.port is None:
        os.environ.update(_ALONE, MASTER_PORT=str(_free_port()))
    accelerator, index = get_accelerator(), start.local_rank or 0
    if accelerator.device_name() == "cpu":
        # Its shared-memory op is only for inference, and compiling it takes half a minute (or
        # fails without ninja). DeepSpeed asks this table before it builds.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if Path("/dev/nvidiactl").exists():
            refuse_hidden_gpus(os.environ)
        keep_freed_memory()
        bound_kernel_caches()
        device = torch.device("cpu")
    else:
        settle_gpu(os.environ)
        index = device_index(start.local_rank, accelerator.device_count(), os.environ)
        accelerator.set_device(index)
        device = torch.device(accelerator.device_name(index))
    os.environ["LOCAL_RANK"] = str(index)
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:  # DeepSpeed wants to find the same
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(index)
    init_process_group(start)
    world = World(deepspeed.comm.get_rank(), deepspeed.comm.get_world_size(), device)
    is_over = False
    try:
        yield world
        is_over = True
    finally:
        # Without this, gloo's threads make the interpreter abort at exit once in a few runs. Not
        # after an exception if there are other ranks: they may be waiting in a collective, and so
        # would this one.
        if is_over or world.size == 1:
            deepspeed.comm.destroy_process_group()
        if start.port is None:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def waiting(collective: str) -> Iterator[None]:
    """This process says that it waits for the others."""
    PROGRESS.wait_for(collective)
    yield
    PROGRESS.arrived()


def gather_objects(value: object) -> list:
    """The objects of all ranks, in rank order, on every rank."""
    gathered: list = [None] * deepspeed.comm.get_world_size()
    with waiting("all_gather_object"):
        torch.distributed.all_gather_object(gathered, value)
    return gathered


def broadcast_from_first(work: Callable[[], T], world: World) -> T:
    """What `work` returns on the first rank, or its GemoeError, on every rank. Collective."""
    found: T | GemoeError | None = None
    if world.is_first:
        try:
            found = work()
        except GemoeError as error:
            found = error
    found = gather_objects(found)[0]
    if isinstance(found, GemoeError):
        raise found
    return cast(T, found)


def sum_over_ranks(tensor: torch.Tensor) -> None:
    """Sum in place over all ranks."""
    with waiting("all_reduce"):
        deepspeed.comm.all_reduce(tensor)


def any_over_ranks(here: bool, device: torch.device) -> bool:
    """Whether it is so on any rank."""
    flag = torch.tensor([here], dtype=torch.int32, device=device)
    with waiting("all_reduce"):
        deepspeed.comm.all_reduce(flag, op=deepspeed.comm.ReduceOp.MAX)
    return bool(flag)


@dataclass(frozen=True)
class Ranks:
    """What several ranks do together."""

    gather: Callable[[object], list]  # one object of each -> those of all, on every rank
    sum: Callable[[torch.Tensor], None]  # in place


ALL_RANKS = Ranks(gather_objects, sum_over_ranks)
ALONE = Ranks(lambda value: [value], lambda tensor: None)
