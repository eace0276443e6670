"""Weights that `device_map` keeps elsewhere, in memory of the host or on disk.

accelerate fetches them for a module that is called. A routed block reads the weights of its experts
without a call, so it does what the hook of that module would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


def owners(block: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The modules in a block that have these parameters."""
    paths = dict.fromkeys(name.rpartition(".")[0] for name in names)
    return [block.get_submodule(path) for path in paths]


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes, wherever its weights are kept; see `check_there`."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        if (device := getattr(one, "execution_device", None)) is not None:
            return torch.device(device)
    check_there(module)
    return next(module.parameters()).device


def check_there(*modules: nn.Module) -> None:
    """ValueError if weights are on the meta device, whose numbers are whatever memory holds."""
    for module in modules:
        if any(parameter.is_meta for parameter in module.parameters()):
            raise ValueError(
                f"the weights of {type(module).__name__} are on the meta device, that is nowhere, "
                "and nothing fetches them: offload by device_map of from_pretrained"
            )


@contextmanager
def fetched(modules: Sequence[nn.Module]) -> Iterator[None]:
    """While their weights are read."""
    with ExitStack() as stack:
        for module in modules:
            hook: Any = getattr(module, "_hf_hook", None)
            if hook is not None:
                hook.pre_forward(module)
                stack.callback(hook.post_forward, module, None)
        yield
