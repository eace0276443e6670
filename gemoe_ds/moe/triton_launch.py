"""Triton where it is installed, and how its kernels are launched."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

triton: Any = None
tl: Any = None
try:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
except ImportError:  # a machine without GPU does without
    pass

NUM_WARPS = 4


def available(device: torch.device) -> bool:
    """Whether the kernels can run on tensors of this device."""
    return triton is not None and device.type == "cuda"


def jit(kernel: Callable[..., None]) -> Any:
    return kernel if triton is None else triton.jit(kernel)


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *more: Any, **constants: Any) -> None:
    """A grid without programs is no launch. `constants` may name another `num_warps`."""
    if 0 in grid:
        return
    # Triton launches on the current device, whatever the tensors'.
    with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
        # Fused or not: said here, because the default differs between versions of Triton.
        options = {"num_warps": NUM_WARPS, "enable_fp_fusion": False} | constants
        kernel[grid](first, *more, **options)
