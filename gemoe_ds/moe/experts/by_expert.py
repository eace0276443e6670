"""One expert after the other, each in buffers that stay in the cache: the way for CPUs.

On a CPU a product of a few hundred rows runs at the rate of a large one, and what is lost is lost
in memory: fresh pages for [A, 2 F] arrays, and passes over them. So rows are gathered, multiplied,
activated and added to the result one expert at a time (3 to 8 MB in flight at D = 2048, F = 1024,
512 rows), and only the gate and up projections outlive their expert.

Serves every dtype and device.
Shapes: N rows, n rows of one expert (filled up, see `_busy`), D model, F expert width, G = 2 F.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, silu

from gemoe_ds.moe.experts import onednn
from gemoe_ds.moe.experts.weights import ExpertWeights
from gemoe_ds.moe.plan import RoutingPlan

_FEW_ROWS = 16  # of an expert; above, its rows are worth buffers of their own
_WORTH_WIDENING = 4  # rows of an expert whose weight takes less time to be widened than they save


def forward(
    x_ND: Tensor,
    plan: RoutingPlan,
    expert_weights: ExpertWeights,
    *,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    """y_ND in the sum's dtype; kept, if asked: the projections [n, G] of every busy expert."""
    plan, counts = plan.without_spare(), plan.counts_on_host
    if not plan.token_ids_A.numel():  # every entry was spare
        return _sums_like(x_ND), []
    few = max(counts, default=0) <= _FEW_ROWS and not expert_weights.one_by_one
    if few and not keep:
        return _forward_few(x_ND, plan, counts, expert_weights), []
    y_ND = _sums_like(x_ND)
    kept = []
    for expert, count, ids_n, weights_n in _busy(plan, counts, expert_weights):
        rows_nD = x_ND.index_select(0, ids_n).to(expert_weights.dtype)
        gate_up_nG = expert_weights.gate_up(rows_nD, expert)
        hidden_nF = _swiglu(gate_up_nG).mul_(weights_n[:, None])
        _add_rows(y_ND, ids_n[:count], expert_weights.down(hidden_nF, expert)[:count])
        if keep:
            kept.append(gate_up_nG)
    return y_ND, kept


def _forward_few(
    x_ND: Tensor, plan: RoutingPlan, counts: list[int], expert_weights: ExpertWeights
) -> Tensor:
    """The same for a few rows an expert, as while an answer is written.

    A product of one row is a pass over the weights, and so many calls as a large one: what is not
    a product is therefore done once for all.
    """
    rows_AD = x_ND.index_select(0, plan.token_ids_A).to(expert_weights.dtype)
    products = partial(_by_each, counts=counts, narrow=expert_weights.narrow)
    if _at_once(counts, expert_weights):
        rows_AD = rows_AD.to(expert_weights.gate_up_EGD.dtype)
        ends_E = plan.tokens_per_expert_E.cumsum(0).to(torch.int32)
        products = partial(expert_weights.gemm.times_transposed, ends_E=ends_E)
    gate_up_AG = products(rows_AD, expert_weights.gate_up_EGD)
    hidden_AF = _swiglu(gate_up_AG).mul_(plan.weights_A[:, None])
    out_AD = products(hidden_AF, expert_weights.down_EDF)
    if x_ND.shape[0] == 1:
        return out_AD.sum(0, keepdim=True, dtype=_sum_dtype(x_ND))
    y_ND = _sums_like(x_ND)
    _add_rows(y_ND, plan.token_ids_A, out_AD)
    return y_ND


def _at_once(counts: list[int], expert_weights: ExpertWeights) -> bool:
    """Whether torch's loop over the experts does what ours would: between products that have
    emptied the cache Python takes tens of microseconds a call."""
    stored = expert_weights.gate_up_EGD.dtype
    if stored not in (torch.float32, torch.bfloat16):
        return False
    weights = expert_weights.gate_up_EGD, expert_weights.down_EDF
    if any(one.shape[2] * one.itemsize % 16 for one in weights):  # it takes whole 16 bytes
        return False
    if expert_weights.narrow == stored:
        return max(counts) < _WORTH_WIDENING
    if onednn.multiplies_in_tiles(expert_weights.gate_up_EGD.device, stored):
        return False
    # With instructions for bfloat16 it takes a few rows in the time of one (Zen 4: 0.22 ms where
    # our product from two rows on takes 0.40); in float32 it does not.
    return expert_weights.dtype == stored and (stored == torch.bfloat16 or max(counts) == 1)


def _by_each(
    rows_AK: Tensor, weight_EMK: Tensor, *, counts: list[int], narrow: torch.dtype | None
) -> Tensor:
    """Each expert's rows @ its weight.T, [A, M]; as little else as can be between the products."""
    dtype, done = rows_AK.dtype, list[Tensor]()
    as_vector = dtype == weight_EMK.dtype and onednn.multiplies_in_tiles(rows_AK.device, dtype)
    rows_or_none = torch.split(rows_AK, counts)
    for expert, count in enumerate(counts):
        if not count:
            continue
        rows_nK, weight_MK = rows_or_none[expert], weight_EMK[expert]
        if narrow is not None and count < _WORTH_WIDENING:
            done.append(linear(rows_nK.to(narrow), weight_MK.to(narrow)).to(dtype))
        elif count == 1 and as_vector:
            done.append(weight_MK.mv(rows_nK[0])[None])
        elif count == 1 or narrow is not None:
            done.append(linear(rows_nK, weight_MK.to(dtype)))
        else:  # a quarter faster, from two rows on
            done.append(weight_MK.to(dtype).mm(rows_nK.t()).t())
    return torch.cat(done)


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
    grad_x_ND = _sums_like(x_ND) if needs_x else None
    grad_weights = []
    grad_gate_up_EGD = torch.zeros_like(expert_weights.gate_up_EGD) if needs_experts else None
    grad_down_EDF = torch.zeros_like(expert_weights.down_EDF) if needs_experts else None
    busy = _busy(plan, plan.counts_on_host, expert_weights)
    for (expert, count, ids_n, weights_n), gate_up_nG in zip(busy, kept, strict=True):
        gate_nF, up_nF = gate_up_nG.chunk(2, -1)
        grad_nD = grad_ND.index_select(0, ids_n).to(expert_weights.dtype)
        grad_hidden_nF = expert_weights.down_grad(grad_nD, expert)
        silu_nF = silu(gate_nF)
        hidden_nF = silu_nF * up_nF
        grad_weights_n = (grad_hidden_nF * hidden_nF).sum(-1, dtype=weights_n.dtype)
        grad_weights.append(grad_weights_n[:count])
        if grad_down_EDF is not None:
            weighted_nF = hidden_nF.mul_(weights_n[:, None])
            grad_down_EDF[expert] = grad_nD.t() @ weighted_nF
        grad_hidden_nF.mul_(weights_n[:, None])
        grad_gate_up_nG = torch.empty_like(gate_up_nG)
        grad_gate_nF, grad_up_nF = grad_gate_up_nG.chunk(2, -1)
        torch.mul(grad_hidden_nF, silu_nF, out=grad_up_nF)
        torch.ops.aten.silu_backward.grad_input(
            grad_hidden_nF.mul_(up_nF), gate_nF, grad_input=grad_gate_nF
        )
        if grad_x_ND is not None:
            grad_rows_nD = expert_weights.gate_up_grad(grad_gate_up_nG, expert)
            _add_rows(grad_x_ND, ids_n[:count], grad_rows_nD[:count])
        if grad_gate_up_EGD is not None:
            grad_gate_up_EGD[expert] = grad_gate_up_nG.t() @ x_ND.index_select(0, ids_n).to(
                expert_weights.dtype
            )
    return (
        None if grad_x_ND is None else grad_x_ND.to(x_ND.dtype),
        torch.cat(grad_weights) if grad_weights else torch.zeros_like(plan.weights_A),
        grad_gate_up_EGD,
        grad_down_EDF,
    )


def _busy(
    plan: RoutingPlan, counts: list[int], expert_weights: ExpertWeights
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(expert, its number of rows, their ids, their weights) of every expert that has rows.

    oneDNN makes a kernel for every number of rows that it meets and keeps about a thousand: with
    ragged counts it would make new ones all the time, at half a millisecond each. So the lists are
    filled up to one of few lengths with row 0 at weight 0, whose results are thrown away.
    """
    lists = torch.split(plan.token_ids_A, counts), torch.split(plan.weights_A, counts)
    ragged = plan.token_ids_A.device.type != "cpu" or expert_weights.dtype != torch.bfloat16
    for expert, (ids, weights) in enumerate(zip(*lists, strict=True)):
        count = ids.numel()
        if count:
            missing = 0 if ragged else -count % _step(count)
            yield expert, count, pad(ids, (0, missing)), pad(weights, (0, missing))


def _step(count: int) -> int:
    """Lengths in use are multiples of this: a 32nd of the count, to a power of two, or more.

    One or two rows in a hundred are filled in; four products of 168 lengths up to 8192 rows.
    """
    return max(8 if count < 128 else 16, 1 << (count // 32).bit_length() >> 1)


def _sums_like(x_ND: Tensor) -> Tensor:
    """Zeros in float32 at least: a bf16 sum over up to 8 experts would lose the small ones."""
    return torch.zeros_like(x_ND, dtype=_sum_dtype(x_ND))


def _sum_dtype(x_ND: Tensor) -> torch.dtype:
    return torch.promote_types(x_ND.dtype, torch.float32)


def _add_rows(sums_ND: Tensor, ids_n: Tensor, rows_nD: Tensor) -> None:
    sums_ND.index_add_(0, ids_n, rows_nD.to(sums_ND.dtype))


def _swiglu(gate_up_nG: Tensor) -> Tensor:
    gate_nF, up_nF = gate_up_nG.chunk(2, -1)
    return silu(gate_nF).mul_(up_nF)
