"""Where a run's time and memory go before and after its steps: one line a phase, and a file."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from gemoe_ds.engine.world import World, gather_objects
from gemoe_ds.progress import PROGRESS

FILE = "profile.json"


@dataclass(frozen=True)
class Phase:
    """Seconds of the slowest rank, and what every rank's memory had been at most by its end."""

    name: str
    seconds: float
    host_bytes: list[int]  # a rank: resident set
    share_bytes: list[int]  # a rank: the same, a page that R processes have counted as 1/R
    device_bytes: list[int]  # a rank: allocated by torch; 0 on CPUs


def peak_host_memory() -> int:
    """Bytes: the largest resident set of this process so far.

    Not `ru_maxrss`, in which a process starts with the peak of the one that forked it.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak(device: torch.device) -> None:
    """Peaks count from here on, where the system can do that; on Linux it can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS: proc(5)


def peak_share() -> int:
    """Bytes: the largest share of this process in its host's memory so far, at most.

    What R processes have mapped in common counts as 1/R now; what was given back since the peak,
    as this process's own.
    """
    now = psutil.Process().memory_full_info()
    return int(getattr(now, "pss", now.rss)) + max(0, peak_host_memory() - now.rss)


def resident_memory() -> int:
    """Bytes of this process that are in memory now."""
    return psutil.Process().memory_info().rss


def peak_memory(device: torch.device) -> int:
    """Bytes that torch has allocated at most on a GPU; on a CPU that of the whole process."""
    on_gpu = device.type == "cuda"
    return torch.cuda.max_memory_allocated(device) if on_gpu else peak_host_memory()


class PhaseTimer:
    """Times phases. Collective: all ranks enter and leave the same ones."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.done: list[Phase] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        PROGRESS.enter(name)
        yield
        seconds, device = time.perf_counter() - began, self.world.device
        allocated = peak_memory(device) if device.type == "cuda" else 0
        mine = (seconds, peak_host_memory(), peak_share(), allocated)
        took, host, share, on_device = map(list, zip(*gather_objects(mine), strict=True))
        self.done.append(Phase(name, max(took), host, share, on_device))
        if self.world.is_first:
            print(self.line(self.done[-1]), flush=True)

    def peak(self, on_gpu: bool, *, without: str) -> int:
        """Bytes of the fullest rank in all phases but one, behind which the peak was forgotten."""
        counted = (phase for phase in self.done if phase.name != without)
        return max(max(p.device_bytes if on_gpu else p.host_bytes) for p in counted)

    @staticmethod
    def line(phase: Phase) -> str:
        host, device = (max(b) / 2**30 for b in (phase.host_bytes, phase.device_bytes))
        on_device = f", device {device:.2f}" if device else ""
        return (
            f"{phase.name}: {phase.seconds:.1f} s; peak so far on the fullest rank, GiB: "
            f"host {host:.2f}{on_device}"
        )

    def write(self, folder: Path) -> None:
        """profile.json, of the last start only."""
        entries = [asdict(phase) for phase in self.done]
        (folder / FILE).write_text(json.dumps(entries, indent=1) + "\n")
