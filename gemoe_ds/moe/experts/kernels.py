"""Triton kernels for CUDA: what one pass over memory can do of an expert layer.

Each computes in float32, reads and writes every number once, and is deterministic: no atomics,
sums in one fixed order. Triton is optional, and so is a GPU: see triton_launch.py.

Shapes: A assignment rows, D model, F expert width, G = 2 F (gate, then up), N rows summed into.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemoe_ds.moe.triton_launch import jit, launch, tl, triton

# NOT tuned on a GPU. All three kernels wait for memory: with 4 warps a thread holds 8 of 1024
# numbers, one 16-byte access in bf16. ptxas gives them 32 registers, the backward up to 55, so an
# SM of an A100 or H100 holds 16 or 9 programs, which should keep its share of memory busy.
_MAX_BLOCK = 1024


def swiglu(gate_up_AG: Tensor, weights_A: Tensor) -> Tensor:
    """silu(gate) * up * weight, [A, F], in the dtype of gate_up; weights are float32."""
    rows, width = _rows_and_width(gate_up_AG, weights_A)
    hidden_AF = torch.empty(rows, width, dtype=gate_up_AG.dtype, device=gate_up_AG.device)
    tensors = gate_up_AG.contiguous(), weights_A.contiguous(), hidden_AF
    _launch(_swiglu_kernel, rows, width, *tensors, split=True)
    return hidden_AF


def swiglu_backward(
    grad_hidden_AF: Tensor, gate_up_AG: Tensor, weights_A: Tensor, want_hidden: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `swiglu`: of gate_up, in its dtype, and of the weights, float32.

    The third is what `swiglu` returned, formed again, for the gradient of a trainable down
    projection: cheaper than to keep it.
    """
    rows, width = _rows_and_width(gate_up_AG, weights_A)
    assert grad_hidden_AF.shape == (rows, width)
    dtype, device = gate_up_AG.dtype, gate_up_AG.device
    grad_gate_up_AG = torch.empty(rows, 2 * width, dtype=dtype, device=device)
    grad_weights_A = torch.empty(rows, dtype=torch.float32, device=device)
    hidden_AF = torch.empty(rows, width, dtype=dtype, device=device) if want_hidden else None
    _launch(
        _swiglu_backward_kernel,
        rows,
        width,
        grad_hidden_AF.contiguous(),  # autograd may hand over an expanded one
        gate_up_AG.contiguous(),
        weights_A.contiguous(),
        grad_gate_up_AG,
        grad_weights_A,
        hidden_AF,
        split=False,  # the sum over F is one program's
    )
    return grad_gate_up_AG, grad_weights_A, hidden_AF


def segment_sum(
    rows_AD: Tensor, order_A: Tensor, ends_N: Tensor, out_dtype: torch.dtype | None = None
) -> Tensor:
    """out[n] = sum of rows[order[i]] for i from ends[n - 1] (0 for the first) up to ends[n].

    One after another in that order, in float32; [N, D] in `out_dtype`, by default the rows'.
    `order_A` and `ends_N` are int64. An empty segment gives zeros.
    """
    assert order_A.dtype == ends_N.dtype == torch.int64
    num_sums, width = ends_N.shape[0], rows_AD.shape[1]
    dtype = rows_AD.dtype if out_dtype is None else out_dtype
    out_ND = torch.empty(num_sums, width, dtype=dtype, device=rows_AD.device)
    tensors = rows_AD.contiguous(), order_A.contiguous(), ends_N.contiguous(), out_ND
    _launch(_segment_sum_kernel, num_sums, width, *tensors, split=True)
    return out_ND


def _rows_and_width(gate_up_AG: Tensor, weights_A: Tensor) -> tuple[int, int]:
    rows, width = gate_up_AG.shape[0], gate_up_AG.shape[1] // 2
    assert gate_up_AG.shape == (rows, 2 * width) and weights_A.shape == (rows,)
    assert weights_A.dtype == torch.float32
    return rows, width


def _launch(kernel: Any, rows: int, width: int, *tensors: Any, split: bool) -> None:
    """One program a row, or with `split` one for every block of a row."""
    block = max(16, min(_MAX_BLOCK, triton.next_power_of_2(width)))
    # Rows go first: the other axes of a grid end at 65535.
    grid = (rows, triton.cdiv(width, block) if split else 1)
    launch(kernel, grid, *tensors, width, BLOCK=block)


# Row numbers are int64 in every kernel: rows times width passes 2^31. No annotation but constexpr:
# the compiler, other than the interpreter, looks annotations up and refuses typing's.


@jit
def _swiglu_kernel(  # type: ignore[no-untyped-def]
    gate_up_ptr, weights_ptr, hidden_ptr, width, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate_ptr = gate_up_ptr + row * 2 * width
    gate = tl.load(gate_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + width + columns, mask=inside, other=0.0).to(tl.float32)
    hidden = gate * tl.sigmoid(gate) * up * tl.load(weights_ptr + row)
    tl.store(hidden_ptr + row * width + columns, hidden, mask=inside)


@jit
def _swiglu_backward_kernel(  # type: ignore[no-untyped-def]
    grad_hidden_ptr,
    gate_up_ptr,
    weights_ptr,
    grad_gate_up_ptr,
    grad_weights_ptr,
    hidden_ptr,  # or None
    width,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights_ptr + row)
    grad_weight = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        gate_ptr = gate_up_ptr + row * 2 * width + columns
        gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_ptr + width, mask=inside, other=0.0).to(tl.float32)
        grad_hidden = tl.load(grad_hidden_ptr + row * width + columns, mask=inside, other=0.0).to(
            tl.float32
        )
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        grad_weight += grad_hidden * silu * up
        grad_product = grad_hidden * weight
        grad_gate = grad_product * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        grad_gate_ptr = grad_gate_up_ptr + row * 2 * width + columns
        tl.store(grad_gate_ptr, grad_gate, mask=inside)
        tl.store(grad_gate_ptr + width, grad_product * silu, mask=inside)
        if hidden_ptr is not None:
            tl.store(hidden_ptr + row * width + columns, silu * up * weight, mask=inside)
    tl.store(grad_weights_ptr + row, tl.sum(grad_weight, axis=0))


@jit
def _segment_sum_kernel(  # type: ignore[no-untyped-def]
    rows_ptr, order_ptr, ends_ptr, out_ptr, width, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    start = tl.load(ends_ptr + row - 1, mask=row > 0, other=0)
    end = tl.load(ends_ptr + row)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(start, end):
        assignment = tl.load(order_ptr + i)
        summand = tl.load(rows_ptr + assignment * width + columns, mask=inside, other=0.0)
        total += summand.to(tl.float32)
    tl.store(out_ptr + row * width + columns, total, mask=inside)
