"""The weights of a published folder by the names of the model here, read when they are asked for.

transformers takes them for slices of a safetensors file: it moves, converts and shards what it
reads, and we say where it stands. One parameter is in memory at a time, not the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemoe_ds.hf_io.key_rules import KeyMap
from gemoe_ds.hf_io.loader import Weights


class StoredParameter:
    """One whole parameter; `[...]` reads it, in the widest dtype of the tensors that make it up."""

    def __init__(self, weights: Weights, name: str, dtype: torch.dtype) -> None:
        self.weights, self.name, self.dtype = weights, name, dtype

    def __getitem__(self, index: Any) -> Tensor:
        return self.weights.read(self.name, self.dtype)[index]

    def is_floating_point(self) -> bool:
        return True

    def get_shape(self) -> list[int]:
        return [*self.weights.shapes[self.name]]


def stored_parameters(
    folder: Path, keys: KeyMap, model: nn.Module, prefix: str
) -> dict[str, StoredParameter]:
    """Every parameter of `model` (a meta model will do) by name, `prefix` before it.

    Raises CheckpointError if a key is missing, unexpected or of another shape.
    """
    weights = Weights(folder, keys, model)
    dtypes: dict[str, torch.dtype] = {}
    for piece in weights.slices:
        dtype = weights.stored[piece.key].dtype
        dtypes[piece.name] = torch.promote_types(dtypes.get(piece.name, dtype), dtype)
    return {f"{prefix}{n}": StoredParameter(weights, n, dtype) for n, dtype in dtypes.items()}


def usual_dtype(parameters: dict[str, StoredParameter]) -> torch.dtype:
    """That of most of the numbers: trained gates are float32 in a bfloat16 folder too."""
    counts: dict[torch.dtype, int] = {}
    for parameter in parameters.values():
        size = torch.Size(parameter.get_shape()).numel()
        counts[parameter.dtype] = counts.get(parameter.dtype, 0) + size
    return max(counts, key=lambda dtype: counts[dtype])
