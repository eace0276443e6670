"""The monotonic loss on CUDA: all pairs in tiles, one kernel.

A wavelet tree takes hundreds of launches; T^2 comparisons of 16,384 tokens are 2.7e8, which a GPU
does in the time of a few launches. NOT run on a GPU. Shapes: T tokens, P programs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemoe_ds.moe.triton_launch import jit, launch, tl, triton

BLOCK = 32  # 4 warps hold 8 pairs a thread, in some 80 registers, none spilled


def all_pairs(
    entropy_T: Tensor, k_soft_T: Tensor, valid_T: Tensor, slope: float, constant: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of all hinges and the number of pairs, float64 scalars; `moved_T`, int32 [T].

    `moved_T` counts a token's hinges that are not 0: those in which it is i, less those in which
    it is j. Compared is in float64, so that the result equals that of `monotonic.py` on a CPU.
    """
    num_programs = triton.cdiv(len(entropy_T), BLOCK)
    moved_T = torch.empty(len(entropy_T), dtype=torch.int32, device=entropy_T.device)
    sums_2P = torch.empty(2, num_programs, dtype=torch.float64, device=entropy_T.device)
    launch(
        _all_pairs_kernel,
        (num_programs,),
        entropy_T.contiguous(),
        k_soft_T.contiguous(),
        valid_T.contiguous(),
        moved_T,
        sums_2P,
        len(entropy_T),
        num_programs,
        SLOPE=slope,
        CONSTANT=constant,
        BLOCK=BLOCK,
    )
    total, num_pairs = sums_2P.sum(1).unbind()
    return total, num_pairs, moved_T


@jit
def _ordered(x):  # type: ignore[no-untyped-def]
    """int64 that compare as float64 `x` do, at full speed where float64 has 1/64 of it."""
    bits = (x + 0.0).to(tl.int64, bitcast=True)  # -0 becomes 0
    return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)


@jit
def _all_pairs_kernel(  # type: ignore[no-untyped-def]
    entropy_ptr,
    k_soft_ptr,
    valid_ptr,
    moved_ptr,
    sums_ptr,
    num_tokens,
    num_programs,
    SLOPE: tl.constexpr,  # no argument, which would be float32
    CONSTANT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    # 1. This program's tokens: v = slope * H - k, u = v + constant.
    i = program * BLOCK + tl.arange(0, BLOCK)
    inside_i = i < num_tokens
    valid_i = tl.load(valid_ptr + i, mask=inside_i, other=0) != 0
    entropy_i = tl.load(entropy_ptr + i, mask=valid_i, other=0.0)
    v_i = SLOPE * entropy_i.to(tl.float64)
    v_i -= tl.load(k_soft_ptr + i, mask=valid_i, other=0.0).to(tl.float64)
    u_i = v_i + CONSTANT
    v_rank_i, u_rank_i = _ordered(v_i), _ordered(u_i)
    # 2. Against all tokens: as i of a pair, as j of one, and pairs whether their hinge is 0 or not.
    #    Summed over a tile's columns at the end, so that the threads need not wait for each other.
    below = tl.zeros([BLOCK, BLOCK], tl.int32)
    above = tl.zeros([BLOCK, BLOCK], tl.int32)
    pairs = tl.zeros([BLOCK, BLOCK], tl.int32)
    for start in range(0, num_tokens, BLOCK):
        j = start + tl.arange(0, BLOCK)
        valid_j = tl.load(valid_ptr + j, mask=j < num_tokens, other=0) != 0
        entropy_j = tl.load(entropy_ptr + j, mask=valid_j, other=0.0)
        v_j = SLOPE * entropy_j.to(tl.float64)
        v_j -= tl.load(k_soft_ptr + j, mask=valid_j, other=0.0).to(tl.float64)
        v_rank_j, u_rank_j = _ordered(v_j), _ordered(v_j + CONSTANT)
        is_both = valid_i[:, None] & valid_j[None, :]
        is_lower = is_both & (entropy_j[None, :] < entropy_i[:, None])
        is_higher = is_both & (entropy_j[None, :] > entropy_i[:, None])
        pairs += is_lower.to(tl.int32)
        below += (is_lower & (v_rank_j[None, :] < u_rank_i[:, None])).to(tl.int32)
        above += (is_higher & (u_rank_j[None, :] > v_rank_i[:, None])).to(tl.int32)
    below_i, above_i = tl.sum(below, axis=1), tl.sum(above, axis=1)
    # 3. What follows from the counts.
    tl.store(moved_ptr + i, below_i - above_i, mask=inside_i)
    total = below_i.to(tl.float64) * u_i - above_i.to(tl.float64) * v_i
    tl.store(sums_ptr + program, tl.sum(total, axis=0))
    tl.store(
        sums_ptr + num_programs + program, tl.sum(tl.sum(pairs.to(tl.float64), axis=1), axis=0)
    )
