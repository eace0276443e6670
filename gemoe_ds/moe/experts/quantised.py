"""Frozen expert weights in 8 or 4 bits: codes, and a float32 scale for each block of a row.

    int8     whole numbers to 127; blocks of 128; 1.03 bytes a weight
    float8   e4m3, as DeepSeek and Qwen publish weights; blocks of 128 rows of 128; 1.03
    nf4      sixteen quantiles of a normal distribution (QLoRA, arXiv 2305.14314, appendix E), two
             in a byte, the first in its upper half, as bitsandbytes has them; blocks of 64; 0.56

A weight is value(code) * scale, computed in float32 and then rounded to the dtype of the product.
Shapes: E experts, M outputs, K inputs, B blocks a row, C bytes of codes a row, n rows.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 128  # of a weight at a time: they stay in the cache
_ROWS_BACK = 256  # the same on the way back
_BINS = 64
_TINY = torch.finfo(torch.float32).tiny
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class Format:
    """`encode`: numbers up to `largest`, [n, K], to codes, [n, C]; `decode`: back, into [n, K]."""

    block: int
    bits: int
    largest: float
    codes: torch.dtype
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, Tensor], None]
    square: bool = False  # a scale is that of 128 rows: folders that are published so stay as exact

    def blocks(self, num_inputs: int) -> int:
        return -(-num_inputs // self.block)

    def extremes(self, codes: Tensor) -> Tensor:
        """Values of the first and the last of these codes, of float8 by their size: [1, n]. If some
        value is NaN, one of them is; if all are 0, all of them are."""
        ends = (codes & 0x7F if self.square else codes).aminmax()
        values = torch.empty(1, 4 * 8 // self.bits)
        self.decode(torch.stack([*ends, *ends])[None], values)  # an even number
        return values

    def num_codes(self, num_blocks: int) -> int:
        """Bytes of them."""
        return num_blocks * self.block * self.bits // 8

    def num_bytes(self, num_rows: int, num_inputs: int) -> int:
        """Of codes and scales."""
        blocks = self.blocks(num_inputs)
        return num_rows * (self.num_codes(blocks) + 4 * blocks)


def _int8(codes_nC: Tensor, into_nK: Tensor) -> None:
    into_nK.copy_(codes_nC)


def _to_float8(scaled_nK: Tensor) -> Tensor:
    return scaled_nK.to(torch.float8_e4m3fn).view(torch.uint8)  # floats would follow a `.to(dtype)`


def _float8(codes_nC: Tensor, into_nK: Tensor) -> None:
    """By table, two at a time: torch's own conversion takes eight times as long."""
    if codes_nC.device.type == "cpu":
        two = codes_nC.view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)
        _look_up(_float8_pairs(), two, into_nK)
    else:
        into_nK.copy_(codes_nC.view(torch.float8_e4m3fn))


@cache
def _float8_pairs() -> Tensor:
    """Both values of two codes in float32, as one int64, by the codes' 16 bits."""
    one = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    low, high = one.repeat(256), one.repeat_interleave(256)
    return torch.stack([low, high], 1).view(torch.int64).view(-1)


def _to_nf4(scaled_nK: Tensor) -> Tensor:
    """By bins, of which none has two middles of levels in it: fifteen comparisons, or
    torch.bucketize, take four and eight times as long."""
    below, middle = _nf4_bins()
    bins = torch.add(scaled_nK, 1).mul_(_BINS / 2).to(torch.int32).reshape(-1)
    found = below.index_select(0, bins).view(scaled_nK.shape)
    found += (scaled_nK > middle.index_select(0, bins).view(scaled_nK.shape)).view(torch.uint8)
    two = found.view(torch.int16)  # the first in the lower byte
    return ((two << 4) | (two >> 8)).to(torch.uint8)


@cache
def _nf4_bins() -> tuple[Tensor, Tensor]:
    """Of _BINS bins from -1 to 1, and one for 1: the code at its lower end, and the middle between
    two levels, in float32, above which it is the next; infinite if there is none."""
    levels = torch.tensor(NF4)
    middles = (levels[1:] + levels[:-1]) / 2
    ends = torch.arange(_BINS + 1) / (_BINS / 2) - 1
    middle = torch.full((_BINS + 1,), torch.inf)
    middle[((middles + 1) * (_BINS / 2)).long()] = middles
    return (ends[:, None] > middles).sum(1).to(torch.uint8), middle


def _nf4(codes_nC: Tensor, into_nK: Tensor) -> None:
    _look_up(_nf4_pairs(codes_nC.device), codes_nC.to(torch.int32), into_nK)


@cache
def _nf4_pairs(device: torch.device) -> Tensor:
    """Both values of a byte in float32, as one int64."""
    levels = torch.tensor(NF4, device=device)
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)
    return pairs.view(torch.int64).view(-1)


def _look_up(table: Tensor, codes_nC: Tensor, into_nK: Tensor) -> None:
    into = into_nK.view(torch.int64).view(-1)
    torch.index_select(table, 0, codes_nC.reshape(-1), out=into)


def _parts(tensor_nK: Tensor, size: int) -> Tensor:
    """[n, K] -> [n, K / size, size]"""
    return tensor_nK.reshape(*tensor_nK.shape[:-1], -1, size)


def _to_int8(scaled_nK: Tensor) -> Tensor:
    return scaled_nK.round().to(torch.int8)


FORMATS = {
    "float8": Format(128, 8, 448.0, torch.uint8, _to_float8, _float8, square=True),
    "int8": Format(128, 8, 127.0, torch.int8, _to_int8, _int8),
    "nf4": Format(64, 4, 1.0, torch.uint8, _to_nf4, _nf4),
}


@torch.no_grad()
def encode(one: Format, values_nK: Tensor, codes_nC: Tensor, scales_nB: Tensor) -> None:
    """Fill codes, of whole blocks, and scales."""
    bound = one.largest
    for first in range(0, len(values_nK), _ROWS):
        rows = slice(first, first + _ROWS)
        values = values_nK[rows].to(torch.float32)
        blocks = _parts(nn.functional.pad(values, (0, -values.shape[-1] % one.block)), one.block)
        most_nB = blocks.abs().amax(-1)
        if one.square:
            most_nB = most_nB.amax(0, keepdim=True).expand_as(most_nB)
        scales_nB[rows] = (most_nB / bound).clamp_min_(_TINY)
        scaled = (blocks / scales_nB[rows, :, None]).clamp_(-bound, bound)
        codes_nC[rows] = one.encode(scaled.flatten(-2))


def decoded(one: Format, codes_nC: Tensor, scales_nB: Tensor) -> Tensor:
    """The numbers in float32, [n, K] of whole blocks; the codes may end before."""
    missing = one.num_codes(scales_nB.shape[-1]) - codes_nC.shape[-1]
    values = torch.empty(*scales_nB.shape, one.block)
    one.decode(nn.functional.pad(codes_nC, (0, missing)), values.flatten(-2))
    return values.mul_(scales_nB[..., None]).flatten(-2)


_of_thread = threading.local()


def _scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of this thread; the largest that it ever asked for stays."""
    kept: dict[Any, Tensor] = _of_thread.__dict__
    size = math.prod(shape)
    found = kept.get((dtype, device))
    if found is None or found.numel() < size:
        found = kept[dtype, device] = torch.empty(size, dtype=dtype, device=device)
    return found[:size].view(shape)


class QuantisedWeight(nn.Module):
    """[E, M, K], or [M, K], in one of the `FORMATS`. No state_dict has it: the base has."""

    codes_EMC: Tensor
    scales_EMB: Tensor

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        """Of undefined values: `put` them."""
        super().__init__()
        self.name, self.format, self.shape = name, FORMATS[name], torch.Size(shape)
        *rows, num_inputs = shape
        blocks = self.format.blocks(num_inputs)
        codes = torch.empty(*rows, self.format.num_codes(blocks), dtype=self.format.codes)
        self.register_buffer("codes_EMC", codes, persistent=False)
        self.register_buffer("scales_EMB", torch.empty(*rows, blocks), persistent=False)

    @classmethod
    def of(cls, name: str, weight_EMK: Tensor) -> QuantisedWeight:
        weight = cls(name, tuple(weight_EMK.shape)).to(weight_EMK.device)
        for expert, weight_MK in enumerate(weight_EMK):
            weight.put(itemgetter(expert), weight_MK)
        return weight

    def put(self, select: Callable[[Tensor], Tensor], values_nK: Tensor) -> None:
        """Fill the rows that `select` finds in a tensor [E, M, ..]."""
        encode(self.format, values_nK, select(self.codes_EMC), select(self.scales_EMB))

    @torch.no_grad()
    def put_stored(
        self, select: Callable[[Tensor], Tensor], codes_nC: Tensor, scales_nB: Tensor
    ) -> None:
        """The same of rows in this very format; their codes may end with the inputs."""
        into, width = select(self.codes_EMC), codes_nC.shape[-1]
        into[..., :width] = codes_nC
        into[..., width:] = 0
        select(self.scales_EMB).copy_(scales_nB)

    def dequantised(
        self, place: int | slice, dtype: torch.dtype, *, until_next: bool = False
    ) -> Tensor:
        """The weight of one expert, [M, K], or of an [M, K] some rows.

        `until_next`: in memory that this thread's next one overwrites, for a product at once.
        """
        codes_MC, scales_MB = self.codes_EMC[place], self.scales_EMB[place]
        num_rows, num_blocks = scales_MB.shape
        shape, device = (num_rows, num_blocks, self.format.block), codes_MC.device
        make = _scratch if until_next else torch.empty
        weight = make(shape, dtype=dtype, device=device)
        at_once = min(_ROWS_BACK, num_rows) if device.type == "cpu" else num_rows
        exact = torch.empty(at_once, *shape[1:], device=device)
        for first in range(0, num_rows, at_once):
            rows = slice(first, first + at_once)
            values = exact[: len(weight[rows])]
            self.format.decode(codes_MC[rows], values.flatten(-2))
            weight[rows] = values.mul_(scales_MB[rows, :, None])
        return weight.flatten(-2)[:, : self.shape[-1]]

    def extra_repr(self) -> str:
        return f"{self.name}, shape={tuple(self.shape)}"
