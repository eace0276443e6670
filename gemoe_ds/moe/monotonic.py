"""The monotonic loss of GeMoE (Eq. 12) over ALL pairs, in O(T log T) time and O(T) memory.

    L = 1/|P| sum_{(i,j) in P} max(0, margin_ij - (k_i - k_j)),   P = {(i, j): H_i > H_j}

With a margin that is a constant c plus slope * (H_i - H_j), each hinge is max(0, u_i - v_j) where
v = slope * H - k and u = v + c. Its sum needs only two counts a token: how many j lie below i in
both H and (v_j < u_i), and how many i lie above j in both. Those counts are also the gradient.

Counting is two-dimensional dominance: tokens stand in order of H, values become dense ranks, and
the ranks are read bit by bit from the top (a wavelet tree, one level at a time). At each level the
elements stand grouped by the bits already read, in order of H within a group; because ranks are
dense, the groups of a level are equally wide, so a level is a row of prefix sums and one gather.

Shapes: T tokens, N = 2 T (every token once as a query i and once as an item j), padded to a power
of two; G groups of W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from gemoe_ds.moe.monotonic_kernel import all_pairs as all_pairs_cuda
from gemoe_ds.moe.opaque import opaque
from gemoe_ds.moe.triton_launch import available


def monotonic_loss(
    entropy_T: Tensor,
    k_soft_T: Tensor,
    valid_T: Tensor | None = None,
    *,
    slope: float = 1.2,
    constant: float = 0.0,
) -> Tensor:
    """Mean hinge over all pairs of valid tokens with H_i > H_j; a scalar, dtype of `k_soft_T`.

    The gradient reaches `k_soft_T`, and `entropy_T` unless it is detached. Ties in H form no pair;
    without pairs the loss is 0. A negative correlation is the same loss with `-entropy_T`.
    The result is exact: sums run in float64. Nothing here waits for the device. On CUDA the pairs
    are gone through, which there takes less time (monotonic_kernel.py).
    """
    if valid_T is None:
        valid_T = torch.ones_like(entropy_T, dtype=torch.bool)
    if torch.compiler.is_compiling():  # one operation of the graph, not what it is made of
        in_graph: Tensor = hinge(entropy_T, k_soft_T, valid_T, slope, constant)[0]
        return in_graph
    loss: Tensor = _AllPairsHinge.apply(entropy_T, k_soft_T, valid_T, slope, constant)  # type: ignore[no-untyped-call]
    return loss


class _AllPairsHinge(torch.autograd.Function):
    """Mean over valid H_i > H_j of max(0, u_i - v_j).

    The gradient to a token's v is the number of its hinges that are not 0 as i, less those as j.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        entropy_T: Tensor,
        k_soft_T: Tensor,
        valid_T: Tensor,
        slope: float,
        constant: float,
    ) -> Tensor:
        given = entropy_T, k_soft_T, valid_T, slope, constant
        loss, moved_T, num_pairs = _hinge(*given)
        _keep(ctx, given, (loss, moved_T, num_pairs))
        return loss

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        return _backward(ctx, grad)


def _hinge(
    entropy_T: Tensor, k_soft_T: Tensor, valid_T: Tensor, slope: float, constant: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss; what its gradient needs, `moved_T` of `all_pairs` and the number of pairs."""
    find = all_pairs_cuda if available(entropy_T.device) else all_pairs
    total, num_pairs, moved_T = find(entropy_T, k_soft_T, valid_T, slope, constant)
    num_pairs = num_pairs.clamp_min(1)
    return (total / num_pairs).to(k_soft_T.dtype), moved_T, num_pairs


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    entropy_T, k_soft_T, _, slope, _ = inputs
    ctx.save_for_backward(*output[1:])
    ctx.slope, ctx.dtypes = slope, (entropy_T.dtype, k_soft_T.dtype)


def _backward(
    ctx: Any, grad: Tensor, *_: Tensor
) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    moved_T, num_pairs = ctx.saved_tensors
    grad_v_T = moved_T * (grad / num_pairs)
    of_entropy, of_k = ctx.dtypes
    wanted_entropy, wanted_k = ctx.needs_input_grad[:2]
    grad_entropy_T = (ctx.slope * grad_v_T).to(of_entropy) if wanted_entropy else None
    return grad_entropy_T, (-grad_v_T).to(of_k) if wanted_k else None, None, None, None


def _shapes(
    entropy_T: Tensor, k_soft_T: Tensor, valid_T: Tensor, slope: float, constant: float
) -> tuple[Tensor, Tensor, Tensor]:
    counts = torch.int32 if available(entropy_T.device) else torch.int64
    moved_T = torch.empty_like(entropy_T, dtype=counts)
    return k_soft_T.new_empty(()), moved_T, k_soft_T.new_empty((), dtype=torch.float64)


hinge = opaque(_hinge, _shapes)
hinge.register_autograd(_backward, setup_context=_keep)


def all_pairs(
    entropy_T: Tensor, k_soft_T: Tensor, valid_T: Tensor, slope: float, constant: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of all hinges and the number of pairs, float64 scalars; `moved_T`, int64 [T].

    `moved_T` counts a token's hinges that are not 0: those in which it is i, less those in which
    it is j.
    """
    inf = torch.inf
    h_T, wide_k_T = (
        torch.where(valid_T, t_T.double(), 0)
        for t_T in (entropy_T, k_soft_T)  # padding: even NaN
    )
    v_T = slope * h_T - wide_k_T
    u_T = v_T + constant
    # An invalid token dominates nothing as i and is dominated by nothing as j.
    below_T, above_T = dominance_counts(h_T, u_T.where(valid_T, -inf), v_T.where(valid_T, inf))
    total = (below_T * u_T).sum() - (above_T * v_T).sum()
    return total, _pairs_above(h_T.where(valid_T, inf), valid_T), below_T - above_T


def _pairs_above(h_T: Tensor, valid_T: Tensor) -> Tensor:
    """#{(i, j) valid: h_i > h_j}, float64; h of invalid tokens is infinite."""
    lower_T = torch.searchsorted(h_T.sort().values, h_T)  # every valid one stands below them
    return (lower_T * valid_T).sum().double()


def dominance_counts(h_T: Tensor, u_T: Tensor, v_T: Tensor) -> tuple[Tensor, Tensor]:
    """`below_T[i]` = #{j: h_j < h_i, v_j < u_i}, `above_T[j]` = #{i: h_i > h_j, u_i > v_j}."""
    num_tokens = h_T.numel()
    # 1. Stand queries and items in order of h, queries first where h ties, so that "before" is "<".
    position_N = torch.cat([h_T, h_T]).argsort(stable=True)
    values_N = torch.cat([u_T, v_T])
    # 2. Dense ranks of the values, queries first where they tie, so that "lower rank" is "<".
    index_N = torch.arange(2 * num_tokens, device=h_T.device)
    rank_N = index_N.index_copy(0, values_N.argsort(stable=True), index_N)
    # 3. Count pairs (item before query, item of lower rank), a pair being split at exactly one bit.
    counts_N = _count_bit_by_bit(rank_N[position_N], position_N >= num_tokens)
    ordered_N = torch.empty_like(counts_N).index_copy(0, position_N, counts_N)
    return ordered_N[:num_tokens], ordered_N[num_tokens:]


def _count_bit_by_bit(rank_N: Tensor, is_item_N: Tensor) -> Tensor:
    """For a query the items before it of lower rank; for an item the queries after it of higher."""
    size, device = rank_N.numel(), rank_N.device
    num_bits = max(size - 1, 1).bit_length()
    # Padded with what is neither: all groups of a level are then equally wide, W, and half of each
    # has the bit.
    padding = (0, (1 << num_bits) - size)
    columns = (rank_N, is_item_N, ~is_item_N, torch.zeros_like(rank_N))
    rank, item, query, count = (nn.functional.pad(c.to(torch.int32), padding) for c in columns)
    place = torch.arange(1 << num_bits, device=device)
    rank[size:] = place[size:]
    for bit in reversed(range(num_bits)):
        half = 1 << bit
        one = (rank >> bit) & 1
        low_item, high_query = item * (1 - one), query * one
        flags_2GW = torch.stack([low_item, high_query]).view(2, -1, 2 * half)
        before_2GW = flags_2GW.cumsum(-1, dtype=torch.int32)
        count = count + high_query * before_2GW[0].view(-1)
        count = count + low_item * (before_2GW[1, :, -1:] - before_2GW[1]).view(-1)
        # Stable split of each group by this bit: zeros first.
        is_one = one.bool()
        split = [
            torch.nonzero_static(o, size=len(o) // 2).view(-1, half) for o in (~is_one, is_one)
        ]
        order = torch.cat(split, dim=1).view(-1)
        rank, item, query, count, place = (
            column.index_select(0, order) for column in (rank, item, query, count, place)
        )
    counts_N = torch.zeros_like(rank_N)
    # in order of rank now, so the padding stands at the end
    return counts_N.index_copy(0, place[:size], count[:size].long())
