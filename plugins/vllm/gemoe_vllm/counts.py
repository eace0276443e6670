"""How many tokens each layer routed and how many experts they used, in files that others read.

vLLM routes in its worker processes and answers `/metrics` in another one. Each worker counts in a
file of its own in a folder that all processes know; whoever answers adds the files up.
Shapes: L layers; of each the tokens, and the experts that they used.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gemoe_vllm._gemoe.moe.host_copy import HostCopy

_SECONDS = 1.0  # between two copies from a device
FOLDER = "GEMOE_VLLM_COUNTS"  # environment variable, which vLLM's other processes inherit


def folder() -> Path:
    """Where the workers count. The first process makes it, and removes it when it ends."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = made = tempfile.mkdtemp(prefix="gemoe-vllm-")
        owner = os.getpid()
        atexit.register(lambda: os.getpid() == owner and shutil.rmtree(made, ignore_errors=True))
    return Path(os.environ[FOLDER])


class Counts:
    """Those of one worker: `row(l)` counts layer l, `publish` brings them to the file."""

    def __init__(self, folder: Path, num_layers: int, device: torch.device) -> None:
        path = folder / f"{os.getpid()}-{time.monotonic_ns()}-{num_layers}.int64"
        self.file_L2 = np.memmap(path, np.int64, "w+", shape=(num_layers, 2))
        self.device_L2: Tensor | None = None
        if device.type != "cpu":
            self.device_L2 = torch.zeros(num_layers, 2, dtype=torch.int64, device=device)
        self._copy: HostCopy | None = None
        self._next = 0.0

    def row(self, layer: int) -> LayerCounts:
        on_device = None if self.device_L2 is None else self.device_L2[layer]
        return LayerCounts(self.file_L2[layer], on_device)

    def publish(self) -> None:
        """Once a step; nothing is waited for: the file gets what was copied a second ago."""
        if self.device_L2 is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _SECONDS
        if self._copy is not None:
            self.file_L2[:] = self._copy.value.numpy()
        self._copy = HostCopy(self.device_L2)


class LayerCounts:
    """Of one layer: on the CPU in the file itself, else on the device, within CUDA graphs too."""

    def __init__(self, file_2: np.ndarray, device_2: Tensor | None) -> None:
        self.file_2, self.device_2 = file_2, device_2

    def add(self, mask_TE: Tensor, served: Tensor | bool) -> None:
        """Tokens and their experts, bool [T, E]; `served`: which rows count, or whether all do."""
        if served is False:
            return
        if isinstance(served, Tensor):
            mask_TE = mask_TE & served[:, None]
        if self.device_2 is None:
            tokens = len(mask_TE) if served is True else int(served.sum())
            self.file_2 += (tokens, int(mask_TE.sum()))
            return
        self.device_2[0] += len(mask_TE) if served is True else served.sum()
        self.device_2[1] += mask_TE.sum()


def read(folder: Path) -> np.ndarray:
    """The sum over all files, int64 [L, 2]; L is that of the largest model, 0 without files."""
    total_L2 = np.zeros((0, 2), np.int64)
    for path in sorted(folder.glob("*.int64")):
        try:
            found_L2 = np.fromfile(path, np.int64).reshape(-1, 2)
        except (OSError, ValueError):
            continue  # it has just gone, or is just being made
        both = np.zeros((max(len(total_L2), len(found_L2)), 2), np.int64)
        both[: len(total_L2)] += total_L2
        both[: len(found_L2)] += found_L2
        total_L2 = both
    return total_L2
