"""All experts in one grouped matrix product: the way for GPUs, without padding and without waiting.

Between the products stand passes that only move memory, so each is one kernel that reads its
input once and writes its output once (kernels.py): activation times weight, its derivative, and
the sum over the assignments of a row, which is both the combine and the gradient of the gather.
Where Triton is absent, plain torch does the same.

Shapes: N rows, A assignments, E experts, D model, F expert width, G = 2 F.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from gemoe_ds.moe.experts import kernels
from gemoe_ds.moe.experts.weights import ExpertWeights
from gemoe_ds.moe.plan import RoutingPlan
from gemoe_ds.moe.triton_launch import available


def forward(
    x_ND: Tensor,
    plan: RoutingPlan,
    expert_weights: ExpertWeights,
    *,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    """y_ND in the dtype of x; kept: the projections [A, G] and the row-major order."""
    ends_E = _ends(plan.tokens_per_expert_E)
    order_A, ends_N = plan.row_major()
    rows_AD = x_ND.to(expert_weights.dtype).index_select(0, plan.token_ids_A)
    gate_up_AG = expert_weights.gate_up_of_all(rows_AD, ends_E)
    hidden_AF = _swiglu(gate_up_AG, plan.weights_A)
    out_AD = expert_weights.down_of_all(hidden_AF, ends_E)
    return _segment_sum(out_AD, order_A, ends_N, x_ND.dtype), [gate_up_AG, order_A, ends_N]


def backward(
    grad_ND: Tensor,
    x_ND: Tensor,
    plan: RoutingPlan,
    expert_weights: ExpertWeights,
    kept: list[Tensor],
    *,
    needs_x: bool,
    needs_experts: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, the weights, and the experts; None where not asked for."""
    gate_up_AG, order_A, ends_N = kept
    dtype, ends_E = expert_weights.dtype, _ends(plan.tokens_per_expert_E)
    grad_AD = grad_ND.to(dtype).index_select(0, plan.token_ids_A)
    grad_hidden_AF = expert_weights.down_grad_of_all(grad_AD, ends_E)
    grad_gate_up_AG, grad_weights_A, hidden_AF = _swiglu_backward(
        grad_hidden_AF, gate_up_AG, plan.weights_A, needs_experts
    )
    grad_x_ND = grad_gate_up_EGD = grad_down_EDF = None
    if needs_x:
        grad_rows_AD = expert_weights.gate_up_grad_of_all(grad_gate_up_AG, ends_E)
        grad_x_ND = _segment_sum(grad_rows_AD, order_A, ends_N, x_ND.dtype)
    if hidden_AF is not None:
        gemm, stored = expert_weights.gemm, expert_weights.down_EDF.dtype
        rows_AD = x_ND.to(dtype).index_select(0, plan.token_ids_A)
        grad_down_EDF = gemm.weight_grad(grad_AD, hidden_AF, ends_E).to(stored)
        grad_gate_up_EGD = gemm.weight_grad(grad_gate_up_AG, rows_AD, ends_E).to(stored)
    return grad_x_ND, grad_weights_A, grad_gate_up_EGD, grad_down_EDF


def _ends(counts: Tensor) -> Tensor:
    return counts.cumsum(0).to(torch.int32)


def _swiglu(gate_up_AG: Tensor, weights_A: Tensor) -> Tensor:
    if available(gate_up_AG.device):
        return kernels.swiglu(gate_up_AG, weights_A)
    gate_AF, up_AF = gate_up_AG.float().chunk(2, -1)
    return (silu(gate_AF) * up_AF * weights_A[:, None]).to(gate_up_AG.dtype)


def _swiglu_backward(
    grad_hidden_AF: Tensor, gate_up_AG: Tensor, weights_A: Tensor, want_hidden: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the projections and the weights, and the forward's output if wanted."""
    if available(gate_up_AG.device):
        return kernels.swiglu_backward(grad_hidden_AF, gate_up_AG, weights_A, want_hidden)
    gate_AF, up_AF = gate_up_AG.float().chunk(2, -1)
    grad_AF, silu_AF = grad_hidden_AF.float(), silu(gate_AF)
    grad_weights_A = (grad_AF * silu_AF * up_AF).sum(-1)
    grad_AF = grad_AF * weights_A[:, None]
    grad_gate_AF = torch.ops.aten.silu_backward(grad_AF * up_AF, gate_AF)
    grad_gate_up_AG = torch.cat([grad_gate_AF, grad_AF * silu_AF], -1).to(gate_up_AG.dtype)
    hidden_AF = (silu_AF * up_AF * weights_A[:, None]).to(gate_up_AG.dtype) if want_hidden else None
    return grad_gate_up_AG, grad_weights_A, hidden_AF


def _segment_sum(rows_AD: Tensor, order_A: Tensor, ends_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of each row's share, in float32 and in one fixed order."""
    if available(rows_AD.device):
        return kernels.segment_sum(rows_AD, order_A, ends_N, dtype)
    counts_N = ends_N.diff(prepend=ends_N.new_zeros(1))
    rows_A = torch.arange(len(ends_N), device=ends_N.device).repeat_interleave(
        counts_N, output_size=len(order_A)
    )
    sums_ND = rows_AD.new_zeros(len(ends_N), rows_AD.shape[1], dtype=torch.float32)
    return sums_ND.index_add_(0, rows_A, rows_AD.index_select(0, order_A).float()).to(dtype)
