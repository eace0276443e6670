"""Triton kernels for CUDA: grouped products with quantised weights, dequantised as they are loaded.

A program forms one tile of the result. It finds its expert on the device, so the host waits for
nothing. Only the tile of the weight at hand exists in full precision. Deterministic: no atomics,
sums in one fixed order. NOT run on a GPU: interpreted, and compiled for sm_80 and sm_90.

Shapes: A assignment rows, expert-major; E experts, M outputs, K inputs, C bytes of codes a row, B
blocks a row; ends_E int32, inclusive row counts.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from gemoe_ds.moe.experts.quantised import NF4, QuantisedWeight
from gemoe_ds.moe.triton_launch import jit, launch, tl, triton

# Tiles, NOT tuned on a GPU: _FEW or _MANY rows, since each tile of rows dequantises anew, by _M and
# _K of the weight (_K divides the blocks of every format). In bfloat16 ptxas takes up to 255
# registers and spills none; in float32, which tests alone multiply, it spills.
_FEW, _MANY, _M, _K, _WARPS = 16, 128, 128, 64, 8


def times_transposed(rows_AK: Tensor, weight: QuantisedWeight, ends_E: Tensor) -> Tensor:
    """rows @ weight[e].T for the rows of each expert, [A, M].

    In the dtype of the rows, bfloat16 or float32, to which weights are rounded; sums in float32.
    Rows from ends_E[-1] on are spare: undefined, as torch's grouped product leaves them.
    """
    return _product(rows_AK, weight, ends_E, transposed=True)


def times(rows_AM: Tensor, weight: QuantisedWeight, ends_E: Tensor) -> Tensor:
    """rows @ weight[e] for the rows of each expert, [A, K]; else as `times_transposed`."""
    return _product(rows_AM, weight, ends_E, transposed=False)


def _product(rows: Tensor, weight: QuantisedWeight, ends_E: Tensor, *, transposed: bool) -> Tensor:
    num_experts, num_outputs, num_inputs = weight.shape
    num_rows, width_in, width, tile = len(rows), num_inputs, num_outputs, _M
    if not transposed:
        width_in, width, tile = num_outputs, num_inputs, _K
    assert rows.shape[1] == width_in and rows.dtype in (torch.bfloat16, torch.float32)
    assert ends_E.shape == (num_experts,) and ends_E.dtype == torch.int32
    out = torch.empty(num_rows, width, dtype=rows.dtype, device=rows.device)
    row_tile = _FEW if num_rows <= _FEW * num_experts else _MANY
    # At most, for counts that the host does not know: of an expert's tiles one may be broken.
    grid = num_rows // row_tile + min(num_rows, num_experts), triton.cdiv(width, tile)
    launch(
        _product_kernel,
        grid,
        rows.contiguous(),
        weight.codes_EMC,
        weight.scales_EMB,
        _levels(rows.device) if weight.name == "nf4" else None,
        ends_E,
        out,
        num_experts,
        num_outputs,
        num_inputs,
        TRANSPOSED=transposed,
        FORMAT=weight.name,
        BLOCK=weight.format.block,
        EXPERTS=triton.next_power_of_2(num_experts),
        ROWS=row_tile,
        M=_M,
        K=_K,
        num_warps=_WARPS,
    )
    return out


@cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(NF4, device=device)


# No annotation but constexpr, and int64 where sizes pass 2^31: see kernels.py.


@jit
def _float8(codes):  # type: ignore[no-untyped-def]
    """Values of e4m3 over 256, exactly: as float16 the bits of one mean that, subnormals too.

    No GPU below compute capability 8.9 converts e4m3 itself.
    """
    codes = codes.to(tl.uint16)
    values = (((codes & 0x80) << 8) | ((codes & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return tl.where((codes & 0x7F) == 0x7F, float("nan"), values.to(tl.float32))


@jit
def _weight_tile(  # type: ignore[no-untyped-def]
    codes_ptr,
    scales_ptr,
    levels_ptr,
    first_row,  # of the expert among all [E * M], int64
    start_m,
    start_k,
    num_outputs,
    num_inputs,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
):
    """float32 [M, K]; 0 from row num_outputs on, whole blocks beyond column num_inputs."""
    m = start_m + tl.arange(0, M)
    inside = m < num_outputs
    row = first_row + m
    num_blocks = tl.cdiv(num_inputs, BLOCK)
    scales = tl.load(scales_ptr + row * num_blocks + start_k // BLOCK, mask=inside, other=0.0)
    if FORMAT == "nf4":
        bytes_ptr = codes_ptr + (row * (num_blocks * (BLOCK // 2)) + start_k // 2)[:, None]
        pairs = tl.load(bytes_ptr + tl.arange(0, K // 2)[None, :], mask=inside[:, None], other=0)
        first, second = tl.load(levels_ptr + (pairs >> 4)), tl.load(levels_ptr + (pairs & 15))
        values = tl.interleave(first, second)
    else:
        bytes_ptr = codes_ptr + (row * (num_blocks * BLOCK) + start_k)[:, None]
        codes = tl.load(bytes_ptr + tl.arange(0, K)[None, :], mask=inside[:, None], other=0)
        if FORMAT == "float8":
            values, scales = _float8(codes), scales * 256.0
        else:
            values = codes.to(tl.float32)
    return values * scales[:, None]


@jit
def _find(tile, ends_ptr, num_experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The expert that a tile of rows belongs to, `num_experts` or more if none, and its first row.

    So many experts as have all their tiles before this one.
    """
    e = tl.arange(0, EXPERTS)
    ends = tl.load(ends_ptr + e, mask=e < num_experts, other=0)
    starts = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < num_experts), other=0)
    tiles = tl.cumsum(tl.cdiv(ends - starts, ROWS), axis=0)
    is_before = tiles <= tile
    start = tl.max(tl.where(is_before, ends, 0), axis=0)
    start += (tile - tl.max(tl.where(is_before, tiles, 0), axis=0)) * ROWS
    return tl.sum(is_before.to(tl.int32), axis=0), start


@jit
def _product_kernel(  # type: ignore[no-untyped-def]
    rows_ptr,
    codes_ptr,
    scales_ptr,
    levels_ptr,  # or None
    ends_ptr,
    out_ptr,
    num_experts,
    num_outputs,
    num_inputs,
    TRANSPOSED: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
) -> None:
    # 1. This program's rows.
    expert, start = _find(tl.program_id(0), ends_ptr, num_experts, EXPERTS, ROWS)
    if expert >= num_experts:
        return
    row = start + tl.arange(0, ROWS)
    inside_row = (row < tl.load(ends_ptr + expert))[:, None]
    row = row.to(tl.int64)[:, None]
    first_row = expert.to(tl.int64) * num_outputs
    # 2. Their product, over all inputs or over all outputs of the weight.
    width_in = num_inputs if TRANSPOSED else num_outputs
    width_out = num_outputs if TRANSPOSED else num_inputs
    STEP: tl.constexpr = K if TRANSPOSED else M
    WIDTH: tl.constexpr = M if TRANSPOSED else K
    start_out = tl.program_id(1) * WIDTH
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for start_in in range(0, width_in, STEP):
        columns = (start_in + tl.arange(0, STEP))[None, :]
        inside = inside_row & (columns < width_in)
        rows = tl.load(rows_ptr + row * width_in + columns, mask=inside, other=0.0)
        start_m = start_out if TRANSPOSED else start_in
        start_k = start_in if TRANSPOSED else start_out
        weight = _weight_tile(
            codes_ptr,
            scales_ptr,
            levels_ptr,
            first_row,
            start_m,
            start_k,
            num_outputs,
            num_inputs,
            FORMAT,
            BLOCK,
            M,
            K,
        ).to(rows.dtype)
        if TRANSPOSED:
            weight = tl.trans(weight)
        total = tl.dot(rows, weight, total, input_precision="ieee")
    columns = (start_out + tl.arange(0, WIDTH))[None, :]
    tl.store(out_ptr + row * width_out + columns, total, mask=inside_row & (columns < width_out))
