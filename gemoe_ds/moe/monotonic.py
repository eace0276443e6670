"""The monotonic loss of GeMoE (Eq. 12) over ALL pairs, in O(T log T) time and O(T) memory.

    L = 1/|P| sum_{(i,j) in P} max(0, margin_ij - (k_i - k_j)),   P = {(i, j): H_i > H_j}

With a margin that is a constant c plus slope * (H_i - H_j), each hinge is max(0, u_i - v_j) where
v = slope * H - k and u = v + c. Its sum needs only two counts a token: how many j lie below i in
both H and (v_j < u_i), and how many i lie above j in both. Those counts are also the gradient.

Counting is two-dimensional dominance: tokens stand in order of H, values become dense ranks, and
the ranks are read bit by bit from the top (a wavelet tree, one level at a time). At each level the
elements stand grouped by the bits already read, in order of H within a group; because ranks are
dense, a group starts at its own smallest rank, so a level is a few prefix sums and one scatter.

Shapes: T tokens, N = 2 T (every token once as a query i and once as an item j).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def monotonic_loss(
    entropy_T: Tensor, k_soft_T: Tensor, *, slope: float = 1.2, constant: float = 0.0
) -> Tensor:
    """Mean hinge over all pairs with H_i > H_j; a scalar of the dtype of `k_soft_T`.

    The gradient reaches `k_soft_T`, and `entropy_T` unless it is detached. Ties in H form no pair;
    without pairs the loss is 0. A negative correlation is the same loss with `-entropy_T`.
    The result is exact: sums run in float64.
    """
    entropy_T, wide_k_T = entropy_T.double(), k_soft_T.double()
    v_T = slope * entropy_T - wide_k_T
    total, num_pairs = _AllPairsHinge.apply(entropy_T.detach(), v_T + constant, v_T)  # type: ignore[no-untyped-call]
    loss: Tensor = (total / num_pairs.clamp_min(1)).to(k_soft_T.dtype)
    return loss


class _AllPairsHinge(torch.autograd.Function):
    """sum over H_i > H_j of max(0, u_i - v_j), and the number of such pairs."""

    @staticmethod
    def forward(ctx: FunctionCtx, h_T: Tensor, u_T: Tensor, v_T: Tensor) -> tuple[Tensor, Tensor]:
        below_T, above_T = dominance_counts(h_T, u_T, v_T)
        below_T, above_T = below_T.to(u_T.dtype), above_T.to(u_T.dtype)
        ctx.save_for_backward(below_T, above_T)
        total = (below_T * u_T).sum() - (above_T * v_T).sum()
        sizes = torch.unique(h_T, return_counts=True)[1].to(u_T.dtype)
        num_pairs = (h_T.numel() ** 2 - sizes.square().sum()) / 2
        ctx.mark_non_differentiable(num_pairs)
        return total, num_pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, _: Tensor) -> tuple[None, Tensor, Tensor]:
        below_T, above_T = ctx.saved_tensors  # type: ignore[attr-defined]
        return None, grad * below_T, -grad * above_T


def dominance_counts(h_T: Tensor, u_T: Tensor, v_T: Tensor) -> tuple[Tensor, Tensor]:
    """`below_T[i]` = #{j: h_j < h_i, v_j < u_i}, `above_T[j]` = #{i: h_i > h_j, u_i > v_j}."""
    num_tokens = h_T.numel()
    # 1. Stand queries and items in order of h, queries first where h ties, so that "before" is "<".
    position_N = torch.cat([h_T, h_T]).argsort(stable=True)
    values_N = torch.cat([u_T, v_T])
    # 2. Dense ranks of the values, queries first where they tie, so that "lower rank" is "<".
    rank_N = torch.empty_like(position_N)
    rank_N[values_N.argsort(stable=True)] = torch.arange(2 * num_tokens, device=h_T.device)
    # 3. Count pairs (item before query, item of lower rank), a pair being split at exactly one bit.
    counts_N = _count_bit_by_bit(rank_N[position_N], position_N >= num_tokens)
    ordered_N = torch.empty_like(counts_N)
    ordered_N[position_N] = counts_N
    return ordered_N[:num_tokens], ordered_N[num_tokens:]


def _count_bit_by_bit(rank_N: Tensor, is_item_N: Tensor) -> Tensor:
    """For a query the items before it of lower rank; for an item the queries after it of higher."""
    size = rank_N.numel()
    index_N = torch.arange(size, device=rank_N.device)
    element_N = index_N  # which element of the input stands here
    counts_N = torch.zeros_like(rank_N)
    for bit in reversed(range(max(size - 1, 1).bit_length())):
        is_one_N = (rank_N >> bit) & 1 == 1
        start_N = rank_N >> (bit + 1) << (bit + 1)
        end_N = (start_N + (2 << bit)).clamp_max(size)
        low_items, high_queries = _before(is_item_N & ~is_one_N), _before(~is_item_N & is_one_N)
        below_N = low_items[index_N] - low_items[start_N]
        above_N = high_queries[end_N] - high_queries[index_N]
        found_N = torch.where(is_item_N, above_N * ~is_one_N, below_N * is_one_N)
        counts_N[element_N] += found_N  # every element stands once: no index repeats
        # Stable split of each group by this bit: zeros first.
        zeros = _before(~is_one_N)
        zeros_before_N = zeros[index_N] - zeros[start_N]
        ones_before_N = index_N - start_N - zeros_before_N
        middle_N = (start_N + (1 << bit)).clamp_max(size)
        target_N = torch.where(is_one_N, middle_N + ones_before_N, start_N + zeros_before_N)
        order_N = torch.empty_like(index_N)
        order_N[target_N] = index_N
        rank_N, is_item_N, element_N = rank_N[order_N], is_item_N[order_N], element_N[order_N]
    return counts_N


def _before(flag_N: Tensor) -> Tensor:
    """Exclusive prefix sum with the total at the end, [N + 1]."""
    return torch.nn.functional.pad(flag_N.cumsum(0), (1, 0))
