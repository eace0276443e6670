"""Peaks of memory, and which of them are counted."""

from __future__ import annotations

import mmap

import torch

from gemoe_ds.engine.world import World
from gemoe_ds.train.profiling import Phase, PhaseTimer, forget_peak, peak_host_memory

SIZE = 300 << 20


def fill() -> None:
    """Memory that is the system's again at once."""
    with mmap.mmap(-1, SIZE) as block:
        for start in range(0, SIZE, mmap.PAGESIZE):
            block[start] = 1


def test_a_phase_that_a_run_has_not_is_not_in_its_peak():
    cpu = torch.device("cpu")
    forget_peak(cpu)  # of the tests before
    timer = PhaseTimer(World(0, 1, cpu))

    def end(name: str) -> int:
        timer.done.append(Phase(name, 0.0, [1, peak_host_memory()], [0, 0], [0, 0]))
        return timer.done[-1].host_bytes[1]

    loading = end("loading")
    fill()
    look = end("a look")
    forget_peak(cpu)
    step = end("one step")
    assert look - max(loading, step) > SIZE - (32 << 20)
    assert timer.peak(False, without="a look") == max(loading, step)
    assert timer.peak(True, without="a look") == 0
