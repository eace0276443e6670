"""Tensors stored in 8 or 4 bits: codes, and their scales under another key.

    float8   as DeepSeek and Qwen publish it: `X.weight` in e4m3, and in `X.weight_scale_inv` a
             scale for every 128 x 128; stacked experts `experts.gate_up_proj` have theirs in
             `experts.gate_up_proj_scale_inv`
    int8     of `gemoe export --quantise`: `X.weight` holds the codes row by row, [M * K] in int8,
    nf4      or [M * K / 2] in uint8; `X.weight_scale` is float32 [M, ceil(K / block)]. Whoever
             takes the codes for weights finds that their shape is another one

Codes and scales mean what they mean in moe/experts/quantised.py. Here they are one stored tensor,
which is read as the numbers that it stands for, or, by whoever keeps it in that format, as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

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

    def parts(
        self, stored: Tensor, rows: slice | None, to_ours: Callable[[Tensor], Tensor] = lambda t: t
    ) -> tuple[Tensor, Tensor]:
        """Of what was read as it is stored: codes [.., M, C], scales [.., M, B] in float32.

        `to_ours` rearranges both; it may exchange rows and inputs where scales are of squares.
        """
        codes, scales = (to_ours(part) for part in self._split(stored, rows))
        scales = scales.to(torch.float32)
        if self.format.square:
            first = rows.start if rows and not self._scaled_by_row else 0
            row_M = torch.arange(first, first + codes.shape[-2])
            scales = scales[..., row_M // BLOCK, :]
        return codes.view(self.format.codes), scales

    def problem_of(self, stored: Tensor, rows: slice | None) -> str | None:
        """What no trained weight is."""
        codes, scales = self._split(stored, rows)
        values = self.format.extremes(codes.view(self.format.codes))
        low, high = (bound.item() for bound in (scales.float() * values.abs().max()).aminmax())
        if not (values.isfinite().all() and math.isfinite(low) and math.isfinite(high)):
            return "holds NaN or infinite numbers"
        if low < 0:
            return "has scales below zero"
        return None if high > 0 else "holds nothing but zeros"

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
        name = _format_of(tensor)
        if name is None:
            found[key] = tensor
            continue
        scales_key = key + (OF_BLOCKS if name == "float8" else OF_ROWS)
        scales = stored.get(scales_key)
        if scales is None:
            stored_in, way = _short(tensor.dtype), name
            if name == "float8":
                stored_in, way = name, f"blocks of {BLOCK} x {BLOCK}"
            raise CheckpointError(
                f"{key} is stored in {stored_in} without {scales_key}; give a folder with scales "
                f"for {way}, or the one before it was quantised"
            )
        found[key] = _with_scales(name, key, tensor, scales_key, scales)
        used.add(scales_key)
    return {key: tensor for key, tensor in found.items() if key not in used}


def _format_of(stored: StoredTensor) -> str | None:
    """Codes of ours have one dimension; other whole numbers are somebody else's."""
    name = _OF_DTYPE.get(stored.dtype)
    return name if name == "float8" or len(stored.shape) == 1 else None


def _with_scales(
    name: str, key: str, codes: StoredTensor, scales_key: str, scales: StoredTensor
) -> QuantisedTensor:
    one, shape, rows = FORMATS[name], codes.shape, scales.shape[:-1]
    num_rows: int = math.prod(rows)
    if not one.square and rows and num_rows:
        codes = replace(codes, shape=(*rows, shape[0] // num_rows))
    fits = len(codes.shape) in (2, 3) and codes.num_bytes == math.prod(shape)
    tensor = QuantisedTensor.of(name, codes, scales) if fits else None
    dtypes = [torch.float32] + [torch.bfloat16] * one.square
    if (
        tensor is None
        or scales.shape != scales_shape(name, tensor.shape)
        or scales.dtype not in dtypes
    ):
        size = f"{one.block} x {one.block}" if one.square else f"{one.block} inputs"
        wanted = list(scales_shape(name, codes.shape)) if one.square else "[rows, blocks]"
        raise CheckpointError(
            f"{scales_key} is {_name(scales)}; for blocks of {size} of {key}, "
            f"{_short(codes.dtype)} {list(shape)}, it would be "
            f"{' or '.join(_short(dtype) for dtype in dtypes)} {wanted}: other blocks are not "
            "supported, give the folder before it was quantised"
        )
    return tensor


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
