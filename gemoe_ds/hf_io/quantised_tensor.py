"""Tensors stored in 8 or 4 bits: codes, and their scales under another key.

    float8   as DeepSeek and Qwen publish it: `X.weight` in e4m3, and in `X.weight_scale_inv` a
             scale for every 128 x 128; stacked experts `experts.gate_up_proj` have theirs in
             `experts.gate_up_proj_scale_inv`
    int8     of `gemoe export --quantise`: `X.weight` [M, K] in int8, and in `X.weight_scale`
    nf4      [M, ceil(K / block)] in float32; nf4 has two codes in a byte: [M, K / 2] in uint8

Codes and scales mean what they mean in moe/experts/quantised.py. Here they are one stored tensor,
which is read as the numbers that it stands for, or, by whoever keeps it in that format, as it is.
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
from gemoe_ds.moe.experts.quantised import FORMATS, Format, decoded

METHOD = "gemoe_ds"  # what config.json calls int8 and nf4 as they are here
BLOCK = 128  # of float8, both ways
OF_BLOCKS, OF_ROWS = "_scale_inv", "_scale"  # what follows a key in that of its scales
_OF_DTYPE = {torch.float8_e4m3fn: "float8", torch.int8: "int8", torch.uint8: "nf4"}
_AT_ONCE = 2**22  # numbers


@dataclass(frozen=True)
class QuantisedTensor(StoredTensor):
    """`shape` [.., M, K] and `dtype` are those of the numbers that it stands for."""

    format_name: str
    codes: StoredTensor  # [.., M, bytes of K]
    scales: StoredTensor  # [.., M, blocks of K]; float8: [.., blocks of M, blocks of K]

    @classmethod
    def of(cls, format_name: str, codes: StoredTensor, scales: StoredTensor) -> QuantisedTensor:
        *rows, width = codes.shape
        shape = (*rows, width * 8 // FORMATS[format_name].bits)
        place = codes.file, codes.offset, shape, torch.float32
        return cls(*place, format_name, codes, scales)

    @property
    def format(self) -> Format:
        return FORMATS[self.format_name]

    @property
    def num_bytes(self) -> int:
        return self.codes.num_bytes + self.scales.num_bytes

    def prefetch(self, rows: slice | None = None) -> None:
        self.codes.prefetch(rows)

    def read(self, rows: slice | None = None) -> Tensor:
        """These rows of its first dimension (all of them by default), in float32."""
        rows = rows or slice(0, self.shape[0])
        tensor = torch.empty(rows.stop - rows.start, *self.shape[1:])
        self.read_into(tensor, rows.start)
        return tensor

    def read_into(self, target: Tensor, first_row: int = 0) -> None:
        step = max(1, _AT_ONCE // max(1, math.prod(self.shape[1:])))
        for first in range(0, len(target), step):
            part = target[first : first + step]
            rows = slice(first_row + first, first_row + first + len(part))
            stored = torch.empty(self.bytes_of(rows), dtype=torch.uint8)
            self.read_stored(stored, rows)
            codes, scales = self.parts(stored, rows)
            found = decoded(self.format, codes.flatten(0, -2), scales.flatten(0, -2))
            part.copy_(found[:, : self.shape[-1]].view(part.shape))

    def bytes_of(self, rows: slice | None) -> int:
        """Of these rows as they are stored."""
        of_scales = self._scales(rows).numel() * self.scales.dtype.itemsize
        return of_scales + self._codes(rows).numel()

    def read_stored(self, into: Tensor, rows: slice | None) -> None:
        """Scales and then codes, into as many bytes."""
        codes, scales = self._split(into, rows)
        self.codes.read_into(codes, rows.start if rows else 0)
        self.scales.read_into(scales, rows.start if rows and self._scaled_by_row else 0)

    def parts(self, stored: Tensor, rows: slice | None) -> tuple[Tensor, Tensor]:
        """Of what was read as it is stored: codes [.., M, C], scales [.., M, B] in float32."""
        codes, scales = self._split(stored, rows)
        scales = scales.to(torch.float32)
        if self.format.square:
            row_M = torch.arange(self.shape[-2])
            row_M = row_M if self._scaled_by_row or rows is None else row_M[rows]
            scales = scales[..., row_M // BLOCK, :]
        return codes.view(self.format.codes), scales

    def _split(self, stored: Tensor, rows: slice | None) -> tuple[Tensor, Tensor]:
        codes, scales = self._codes(rows), self._scales(rows)
        size = scales.numel() * self.scales.dtype.itemsize
        return (
            stored[size:].view(self.codes.dtype).view(codes.shape),
            stored[:size].view(self.scales.dtype).view(scales.shape),
        )

    @property
    def _scaled_by_row(self) -> bool:
        """Whether a row of the first dimension has scales of its own."""
        return not self.format.square or len(self.shape) == 3

    def _codes(self, rows: slice | None) -> Tensor:
        """The shape of those that belong to these rows."""
        return torch.empty(self.codes.shape, device="meta")[rows or ...]

    def _scales(self, rows: slice | None) -> Tensor:
        return torch.empty(self.scales.shape, device="meta")[
            (rows if self._scaled_by_row else None) or ...
        ]


def with_scales(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors by key, those in few bits with their scales; CheckpointError if these do not fit."""
    found: dict[str, StoredTensor] = {}
    used = set()
    for key, tensor in stored.items():
        name = _OF_DTYPE.get(tensor.dtype)
        scales_key = key + (OF_BLOCKS if name == "float8" else OF_ROWS)
        scales = stored.get(scales_key)
        if name is None or (scales is None and name != "float8"):
            found[key] = tensor
            continue
        if scales is None:
            raise CheckpointError(
                f"{key} is stored in float8 without {scales_key}; give a folder with scales for "
                f"blocks of {BLOCK} x {BLOCK}, or the one before it was quantised"
            )
        found[key] = QuantisedTensor.of(name, tensor, scales)
        _check_scales(key, found[key], scales_key, scales)
        used.add(scales_key)
    return {key: tensor for key, tensor in found.items() if key not in used}


def _check_scales(key: str, tensor: StoredTensor, scales_key: str, scales: StoredTensor) -> None:
    assert isinstance(tensor, QuantisedTensor)
    wanted, block = scales_shape(tensor.format_name, tensor.shape), tensor.format.block
    dtypes = [torch.float32] + [torch.bfloat16] * tensor.format.square
    if scales.shape != wanted or scales.dtype not in dtypes:
        size = f"{block} x {block}" if tensor.format.square else f"{block} inputs"
        raise CheckpointError(
            f"{scales_key} is {_name(scales)}; for blocks of {size} of {key} it would be "
            f"{' or '.join(_short(dtype) for dtype in dtypes)} {list(wanted)}: other blocks are "
            "not supported, give the folder before it was quantised"
        )


def scales_shape(format_name: str, shape: Shape) -> Shape:
    """Of the stored scales of a tensor of this shape; () for one that has none."""
    if len(shape) not in (2, 3):
        return ()
    *before, num_rows, num_inputs = shape
    one = FORMATS[format_name]
    rows = -(-num_rows // BLOCK) if one.square else num_rows
    return (*before, rows, one.blocks(num_inputs))


def _name(tensor: StoredTensor) -> str:
    return f"{_short(tensor.dtype)} {list(tensor.shape)}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
