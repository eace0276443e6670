"""Freed host memory stays with the process; what oneDNN keeps for itself is bounded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from gemoe_ds.engine.malloc import bound_kernel_caches

PROBE = """
import resource, sys, torch
from gemoe_ds.engine.malloc import keep_freed_memory
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


@pytest.mark.slow  # it is glibc alone that is measured
def test_large_blocks_are_given_back_without_it():
    assert faults("as it is") > 4 * (128 << 20) / (2 << 20), "else the setting is not needed"


KERNELS = """
import sys, psutil, torch
from gemoe_ds.engine.malloc import MOST_KERNELS, bound_kernel_caches
if sys.argv[1] == "bound":
    bound_kernel_caches()
x, w = torch.ones(600, 64).bfloat16(), torch.ones(64, 64).bfloat16()
def resident(shapes):
    for n in shapes:
        x[:n] @ w
    return psutil.Process().memory_info().rss
print(-resident(range(1, MOST_KERNELS + 1)) + resident(range(MOST_KERNELS + 1, 600)))
"""


def grown(how: str) -> int:
    """Bytes, by more shapes than are kept."""
    command = [sys.executable, "-c", KERNELS, how]
    own = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=own)
    return int(ran.stdout)


multiplies_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN multiplies no bfloat16 here"
)


@multiplies_bfloat16
def test_kernels_of_ever_new_shapes_are_not_all_kept():
    assert grown("bound") < 100 << 20, "some 10 MB; more where the system takes idle pages back"


@pytest.mark.slow  # it is oneDNN alone that is measured
@multiplies_bfloat16
def test_kernels_of_ever_new_shapes_are_all_kept_without_it():
    assert grown("as it is") > 150 << 20, "else the setting is not needed"


def test_the_users_own_number_of_kernels_counts(monkeypatch):
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "9")
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    bound_kernel_caches()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "9"
    assert os.environ.pop("LRU_CACHE_CAPACITY") == "1"
