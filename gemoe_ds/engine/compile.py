"""torch.compile of what is dense: attention, norms and vision blocks, each a graph of its own.

A region is the largest part of a repeated block that has no MoE layer in it. Blocks of one class
share one compilation, for every length. The MoE layers stay as they are: their products are
kernels already, and their shapes follow the routing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.layer import MoELayer
from gemoe_ds.moe.triton_launch import triton


def compile_dense(model: nn.Module, backend: str = "inductor") -> list[str]:
    """Compile the regions in place, with torch's compiler by default; their names.

    The first forward and the first backward pass compile; parameters and buffers keep their names.
    """
    compiled: dict[type[nn.Module], Callable[..., Any]] = {}
    names = []
    for name, module in regions(model):
        kind = type(module)
        if kind not in compiled:
            compiled[kind] = torch.compile(kind.forward, dynamic=True, backend=backend)
        # A method, not a wrapper: hooks run around it, and a copy of the module has its own.
        module.forward = MethodType(compiled[kind], module)
        names.append(name)
    return names


def regions(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each, in the model's own order."""
    for name, module in model.named_children():
        path = f"{prefix}{name}"
        if isinstance(module, nn.ModuleList):
            for index, block in module.named_children():
                yield from _dense_parts(block, f"{path}.{index}")
        else:
            yield from regions(module, f"{path}.")


def _dense_parts(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    if not any(isinstance(part, MoELayer) for part in module.modules()):
        yield path, module
    elif not isinstance(module, MoELayer):
        for name, part in module.named_children():
            yield from _dense_parts(part, f"{path}.{name}")


def check_compiler(device: torch.device) -> None:
    """ConfigError where that is missing which torch's compiler needs."""
    if device.type == "cuda" and triton is None:
        lacks = "Triton, which writes its kernels; pip install triton"
    elif device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        lacks = "a C++ compiler (Debian: apt install g++)"
    else:
        return
    raise ConfigError(f"model.compile=dense: torch.compile needs {lacks}, or set none")
