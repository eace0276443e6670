"""Collectives, seconds and open files of one rank, by phase of a run."""

from __future__ import annotations

import functools
import os
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

COLLECTIVES = (
    "all_gather_object",
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "reduce",
    "reduce_scatter_tensor",
)


class Counter:
    """Counts from when it is made to the end of the process; a process has one."""

    def __init__(self) -> None:
        self.phase = "start"
        self.calls: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self.cpu: dict[str, list[float]] = defaultdict(list)  # seconds, a call each
        for name in COLLECTIVES:
            self._wrap(dist, name, self._counted)

    def time(self, owner: Any, name: str, label: str, phase: str | None = None) -> None:
        """CPU seconds of every call of `owner.name`; what it calls counts as of `phase`."""

        def timed(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def run(*arguments: Any, **options: Any) -> Any:
                before, began = self.phase, time.process_time()
                self.phase = phase or before
                try:
                    return function(*arguments, **options)
                finally:
                    self.phase = before
                    self.cpu[label].append(time.process_time() - began)

            return run

        self._wrap(owner, name, timed)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__

        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            self.calls[self.phase][name] += 1
            return function(*arguments, **options)

        return run

    @staticmethod
    def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        setattr(owner, name, wrapper(getattr(owner, name)))

    def found(self) -> dict[str, Any]:
        return {
            "calls": {phase: dict(calls) for phase, calls in self.calls.items()},
            "cpu": {label: sum(seconds) for label, seconds in self.cpu.items()},
            "step": sorted(self.cpu["step"])[len(self.cpu["step"]) // 2] if self.cpu["step"] else 0,
        }


def open_files() -> tuple[int, int]:
    """Of this process: all, and the sockets among them."""
    links = []
    for file in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            links.append(str(Path(f"/proc/self/fd/{file}").readlink()))
    return len(links), sum(link.startswith("socket") for link in links)
