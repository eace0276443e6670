"""Paired timing: all contenders in turn, round after round, so that drift meets all alike."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gemoe_ds.cluster import preflight
from gemoe_ds.engine.malloc import bound_kernel_caches

_clock: Callable[[], float] = time.perf_counter


def use_cpu_seconds() -> None:
    """From now on time what this process computes, on one thread: other work of a busy machine then
    counts as far as it takes caches and memory, and no further."""
    global _clock
    torch.set_num_threads(1)
    _clock = time.process_time


def keep_kernels() -> None:
    """Before the first product: room for the kernels of all contenders at once.

    A run of ours keeps few. Contenders that take turns would push out each other's, and each would
    build its own again within its time: on a Zen 5 7 % of torchtitan's, 5 to 10 % of ours at k 5.1.
    """
    bound_kernel_caches(4096, 4096)


@dataclass(frozen=True)
class Timing:
    """Seconds of every round after the warm-up; over ranks, of the slowest."""

    seconds: list[float] = field(repr=False)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def row(self) -> dict[str, Any]:
        """For a results file, in milliseconds."""
        low, high = self.quartiles
        return {
            "ms": round(1e3 * self.median, 3),
            "quartiles_ms": [round(1e3 * low, 3), round(1e3 * high, 3)],
            "rounds": len(self.seconds),
        }


def paired(value: Callable[..., float], *timings: Timing) -> float:
    """The median over rounds of a figure of several contenders, each round on its own."""
    rounds = zip(*(t.seconds for t in timings), strict=True)
    return statistics.median(value(*seconds) for seconds in rounds)


def measure(
    contenders: dict[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] | None = None,
    before: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing]:
    """Run each contender once a round, after a round that does not count.

    On several ranks all must call this with the same names.
    `before` is called with a contender's name, and takes no part in its time.
    """
    clock, on_gpu = clock or _clock, torch.cuda.is_available()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(1 + rounds):
        for name, run in contenders.items():
            before(name)
            if dist.is_initialized():
                dist.barrier()
            if on_gpu:
                torch.cuda.synchronize()
            start = clock()
            run()
            if on_gpu:
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    return {name: Timing(_slowest(taken[1:])) for name, taken in seconds.items()}


def _slowest(seconds: list[float]) -> list[float]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return seconds
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, seconds)
    return [max(of_round) for of_round in zip(*gathered, strict=True)]


def peak_memory(run: Callable[[], Any]) -> int | None:
    """Bytes that a call needs on top of what is there already; None where it cannot be told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was kept would hide what is needed
        before = _kilobytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        run()
        return 1024 * (_kilobytes("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _kilobytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def free_memory() -> int:
    """Bytes that this process could still take, of the device that it computes on."""
    return preflight.free_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
