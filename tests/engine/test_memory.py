"""Freed host memory stays with the process, so that the next step does not fault it in again."""

from __future__ import annotations

import subprocess
import sys

PROBE = """
import resource, sys, torch
from gemoe_ds.engine.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    for _ in range(12):  # it takes a few rounds until freed blocks have grown together
        torch.zeros(32 << 20)  # 128 MB, above what glibc would keep
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.zeros(32 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults())
"""


def faults(how: str) -> int:
    command = [sys.executable, "-c", PROBE, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_large_blocks_are_reused():
    assert faults("keep") < 100
    assert faults("as it is") > 4 * (128 << 20) / (2 << 20), "else the setting is not needed"
