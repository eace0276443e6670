"""Functions that torch.compile takes as one operation, whatever is in them.

What follows the number of rows step by step (loops over parts, kernels that are chosen by size)
would be traced anew for every length. Eager code does not come this way: a call costs more.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch


def opaque(function: Callable[..., Any], shapes: Callable[..., Any]) -> Any:  # torch's CustomOpDef
    """The operation that `function` (tensors and numbers -> new tensors) becomes in a graph.

    `shapes` gives results of the same shapes and dtypes, whose numbers nobody reads. The name is
    that of the module: an exported folder has a copy of it, with operations of its own.
    """
    place = re.sub(r"\W", "_", function.__module__)
    name = f"{place}::{function.__name__.strip('_')}"
    operation = torch.library.custom_op(name, function, mutates_args=())
    operation.register_fake(shapes)
    return operation
