"""Lets torchvision's transforms be imported where its operators cannot be loaded.

PyPI's torchvision is built for CUDA; beside a torch for CPUs its import ends with "operator
torchvision::nms does not exist". This names the two operators that the import looks for, without
an implementation: whoever calls one gets torch's error. With a torchvision for CPUs
(https://download.pytorch.org/whl/cpu) it is not needed. `make serve-env` puts it into its
environment where it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

OPERATORS = ("nms", "qnms")


class _Before(MetaPathFinder):
    """Runs before torchvision is imported, once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        library = torch.library.Library("torchvision", "DEF")
        for operator in OPERATORS:
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        self.library = library  # what it has defined goes with it
        _KEPT.append(self)


_KEPT: list[_Before] = []
sys.meta_path.insert(0, _Before())
