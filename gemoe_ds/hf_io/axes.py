"""einops' `rearrange` for what key rules say: an exported folder's code cannot ask for einops.

Patterns are einops' own, with names, `1` and groups in parentheses: "d (y x c) -> d c y x".
"""

from __future__ import annotations

import math
import re

from torch import Tensor

_AXES = re.compile(r"\(([\w ]*)\)|(\w+)")


class AxesError(ValueError):
    """A tensor whose shape does not fit the pattern."""


def rearrange(tensor: Tensor, pattern: str, **sizes: int) -> Tensor:
    """`tensor` with its axes split, ordered and joined as `pattern` says.

    Args:
        tensor: as the left side of the pattern has it.
        pattern: "left -> right"; both sides name the same axes, each once; `1` is an axis of one.
        sizes: of axes that a group splits into; one of each group may be left out.

    Raises:
        AxesError: the shape does not fit.
    """
    left, right = (_groups(side) for side in pattern.split("->"))
    if tensor.dim() != len(left):
        raise AxesError(f"{list(tensor.shape)} has not the {len(left)} axes of {pattern!r}")
    known: dict[str, int] = {}
    for size, group in zip(tensor.shape, left, strict=True):
        unknown = [name for name in group if name not in sizes]
        rest = math.prod(sizes[name] for name in group if name in sizes)
        if len(unknown) > 1 or size % rest or (not unknown and size != rest):
            raise AxesError(f"{list(tensor.shape)} does not fit {pattern!r} with {sizes}")
        known |= {name: sizes.get(name, size // rest) for name in group}
    names = [name for group in left for name in group]
    order = [names.index(name) for group in right for name in group]
    split = tensor.reshape([known[name] for name in names]).permute(order)
    return split.reshape([math.prod(known[name] for name in group) for group in right])


def _groups(side: str) -> list[list[str]]:
    """The names that make up each axis; `1` has none."""
    found = []
    for group, name in _AXES.findall(side):
        found.append([] if name == "1" else [name] if name else group.split())
    return found
