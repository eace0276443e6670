"""One rank was asked to stop, and all of them stop at the same point. Collective."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.engine.world import World, any_over_ranks, gather_objects
from gemoe_ds.errors import Stopped
from gemoe_ds.progress import PROGRESS

T = TypeVar("T")


def stop_together(stop: StopRequest, world: World, where: str) -> None:
    """Raise Stopped on all ranks if any was asked to; `where` ends its message."""
    if any_over_ranks(bool(stop.by), world.device):
        raise Stopped(f"{who_asked(stop)}, {where}")


def who_asked(stop: StopRequest) -> str:
    asked = [f"{by} to rank {rank}" for rank, by in enumerate(gather_objects(stop.by)) if by]
    return ", ".join(asked)


def until_stopped(
    batches: Iterable[T], phase: str, stop: StopRequest, world: World, where: str
) -> Iterator[T]:
    """The batches, each a move of `phase` (gemoe_ds/progress.py), until a rank is asked to stop."""
    for batch in batches:
        stop_together(stop, world, where)
        PROGRESS.enter(phase)
        yield batch
