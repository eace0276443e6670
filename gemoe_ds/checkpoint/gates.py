"""The gates of a model before and after its training, read from files without building the model.

Shapes: L MoE layers, E experts, D width of the gate.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gemoe_ds.checkpoint.manifest import WEIGHTS, read
from gemoe_ds.errors import CheckpointError
from gemoe_ds.hf_io.safetensors_reader import open_stored

BEFORE, AFTER = "before", "after"


def read_gates(checkpoint: Path) -> dict[str, np.ndarray]:
    """gate_LED of the base model and of what was trained on it; CheckpointError says what lacks.

    A base model without gates (a dense one, made sparse by training) has no `before`.
    """
    found = read(checkpoint)
    names = {name for name in found.keys(WEIGHTS) if name.endswith(".router.gate.weight")}
    if not names:
        raise CheckpointError(f"{checkpoint}: no gate of a router was trained")
    try:
        after_LED = _stacked(dict(found.tensors(WEIGHTS, names)))
    except OSError as error:
        raise CheckpointError(f"{checkpoint}: {error.strerror or error}") from error
    base = found.manifest.get("base") or {}
    before_LED = _base_gates(Path(base["path"]), after_LED.shape) if base.get("path") else None
    gates = {} if before_LED is None else {BEFORE: before_LED}
    return gates | {AFTER: after_LED}


def _base_gates(folder: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Tensors named *gate.weight that have the shape of a gate, if there is one a layer."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: the base model is not there")
    stored = {
        name: tensor
        for name, tensor in open_stored(folder).items()
        if name.endswith("gate.weight") and tensor.shape == shape[1:]
    }
    if len(stored) != shape[0]:
        return None
    return _stacked({name: tensor.read() for name, tensor in stored.items()})


def _stacked(gates: dict[str, Tensor]) -> np.ndarray:
    """In the order of the layers: names hold their numbers."""
    return torch.stack([gates[name].to(torch.float32) for name in _by_layer(gates)]).numpy()


def _by_layer(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
