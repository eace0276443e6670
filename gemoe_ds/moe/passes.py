"""A forward with gradients, as its recomputation and its backward pass find it.

Autograd numbers its nodes as they are made. The number of the node that is being worked on tells
which forward a recomputation belongs to, also among several of equal shape.
"""

from __future__ import annotations

from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor


def in_backward() -> bool:
    """Whether this runs in a backward pass: a layer that does is recomputed."""
    return torch._C._current_graph_task_id() != -1


def next_node() -> int:
    """The number of the node that this thread makes next."""
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


def node_in_backward() -> int:
    """The number of the node whose gradient is being worked out."""
    return int(torch._C._current_autograd_node()._sequence_nr())


class Pass:
    """One forward; `state` is what its layers find when they run a second time."""

    def __init__(self, first_node: int, state: dict[str, Any]) -> None:
        self.state = state
        self.trains = False  # its layers were in training mode
        self.was_asked = False  # for its auxiliary losses
        self.went_backward = False
        self._first_node, self._end_node = first_node, float("inf")
        self._graph: ReferenceType[_Graph] | None = None

    def end(self) -> None:
        """No node that is made from now on belongs to it. Those that are made between its layers
        and the next forward do: they may be recomputed together with it."""
        self._end_node = next_node()

    def made(self, node: int) -> bool:
        return self._first_node <= node < self._end_node

    def watch(self, output: Tensor) -> None:
        """Note when the graph of `output` is freed, and when it goes backward."""
        graph = _Graph(self)
        output.register_hook(graph.mark)  # type: ignore[no-untyped-call]
        self._graph = ref(graph)

    @property
    def is_open(self) -> bool:
        """A backward pass may still come."""
        return not self.went_backward and self._graph is not None and self._graph() is not None


class _Graph:
    """Hangs in a graph, and lives as long."""

    def __init__(self, one: Pass) -> None:
        self._pass = ref(one)  # else the graph held the losses, which hold a graph

    def mark(self, grad: Tensor) -> None:
        one = self._pass()
        if one is not None:
            one.went_backward = True
