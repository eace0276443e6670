"""Folders in float8, as DeepSeek and Qwen publish them: e4m3, times a scale for every 128 x 128.

`X.weight` has its scales in `X.weight_scale_inv`, and stacked experts `experts.gate_up_proj` in
`experts.gate_up_proj_scale_inv`. Here a weight and its scales are one stored tensor, which is read
as the numbers that it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gemoe_ds.errors import CheckpointError
from gemoe_ds.hf_io.key_rules import Shape
from gemoe_ds.hf_io.safetensors_reader import StoredTensor

BLOCK = 128
SCALES = "_scale_inv"
_AT_ONCE = 2**22  # numbers


@dataclass(frozen=True)
class ScaledTensor(StoredTensor):
    """[M, K] or [E, M, K] in float8; scales: [ceil(M / 128), ceil(K / 128)], or E times that."""

    scales: StoredTensor

    def read(self, rows: slice | None = None) -> Tensor:
        """These rows of its first dimension, in float32."""
        first, end = (rows.start, rows.stop) if rows else (0, self.shape[0])
        tensor = torch.empty(end - first, *self.shape[1:])
        self.read_into(tensor, first)
        return tensor

    def read_into(self, target: Tensor, first_row: int = 0) -> None:
        step = max(1, _AT_ONCE // max(1, math.prod(self.shape[1:])))
        for first in range(0, len(target), step):
            part = target[first : first + step]
            codes = torch.empty(part.shape, dtype=self.dtype)
            super().read_into(codes, first_row + first)
            scales = self.scales_by_row(slice(first_row + first, first_row + first + len(part)))
            scales = scales.repeat_interleave(BLOCK, -1)[..., : self.shape[-1]]
            part.copy_(codes.to(torch.float32).mul_(scales))

    def scales_by_row(self, rows: slice | None = None) -> Tensor:
        """[.., M, ceil(K / 128)] in float32, of these rows of the first dimension."""
        rows = rows or slice(0, self.shape[0])
        if len(self.shape) == 3:
            of_blocks = self.scales.read(rows).to(torch.float32)
            return of_blocks.repeat_interleave(BLOCK, 1)[:, : self.shape[1]]
        blocks = torch.arange(rows.start, rows.stop).div_(BLOCK, rounding_mode="floor")
        return self.scales.read().to(torch.float32)[blocks]


def with_scales(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors by key, those in float8 with their scales; CheckpointError if these do not fit."""
    found: dict[str, StoredTensor] = {}
    used = set()
    for key, tensor in stored.items():
        if tensor.dtype != torch.float8_e4m3fn:
            found[key] = tensor
            continue
        scales = stored.get(key + SCALES)
        if scales is None:
            raise CheckpointError(
                f"{key} is stored in float8 without {key + SCALES}; give a folder with scales for "
                f"blocks of {BLOCK} x {BLOCK}, or the one before it was quantised"
            )
        wanted = _shape_of_scales(tensor.shape)
        if scales.shape != wanted or scales.dtype not in (torch.float32, torch.bfloat16):
            raise CheckpointError(
                f"{key + SCALES} is {_name(scales)}; for blocks of {BLOCK} x {BLOCK} of {key} it "
                f"would be float32 or bfloat16 {list(wanted)}: other blocks are not supported, "
                "give the folder before it was quantised"
            )
        fields = tensor.file, tensor.offset, tensor.shape, tensor.dtype
        found[key] = ScaledTensor(*fields, scales)
        used.add(key + SCALES)
    return {key: tensor for key, tensor in found.items() if key not in used}


def _shape_of_scales(shape: Shape) -> Shape:
    if len(shape) not in (2, 3):
        return ()
    *before, num_rows, num_inputs = shape
    return (*before, -(-num_rows // BLOCK), -(-num_inputs // BLOCK))


def _name(tensor: StoredTensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
