"""Auxiliary losses and measures of a router's scores: pure functions of tensors.

Shapes: T tokens, E experts. Padding is excluded by `valid_T` (bool) everywhere, whatever it holds.
"""

from __future__ import annotations

import torch
from torch import Tensor


def entropy_bits(scores_TE: Tensor) -> Tensor:
    """Gating entropy H(x) = -sum_i w_i log2 w_i over all experts (GeMoE Eq. 8), [T].

    A score of exactly 0 contributes 0, in value and gradient.
    """
    return -(scores_TE * scores_TE.clamp_min(torch.finfo(scores_TE.dtype).tiny).log2()).sum(-1)


def load_balance(scores_TE: Tensor, mask_TE: Tensor, valid_T: Tensor) -> Tensor:
    """E sum_i f_i P_i (GeMoE Eq. 3): 1 at perfect balance, for any mean k.

    f_i is expert i's share of all assignments, counts_i / (T * mean k), without gradient; P_i the
    mean score. Dividing by the actual mean k keeps the scale of the loss when k falls. Zero
    where no token is routed.
    """
    valid_T1 = valid_T[:, None]
    counts_E = (mask_TE & valid_T1).sum(0).to(scores_TE.dtype)
    share_E = counts_E / counts_E.sum().clamp_min(1)
    mean_score_E = torch.where(valid_T1, scores_TE, 0).sum(0) / valid_T.sum().clamp_min(1)
    return scores_TE.shape[1] * (share_E * mean_score_E).sum()


def average_ranks(values_N: Tensor) -> Tensor:
    """Ranks 0..N-1 as float64, ties sharing their average."""
    _, group_N, counts_G = torch.unique(values_N, return_inverse=True, return_counts=True)
    last_G = counts_G.cumsum(0).double() - 1
    ranks_N: Tensor = (last_G - (counts_G.double() - 1) / 2)[group_N]
    return ranks_N


def spearman(a_N: Tensor, b_N: Tensor) -> Tensor | None:
    """Spearman's rank correlation with tied ranks averaged; None where either is constant."""
    if a_N.numel() < 2:
        return None
    a, b = average_ranks(a_N), average_ranks(b_N)
    a, b = a - a.mean(), b - b.mean()
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return None if scale == 0 else (a * b).sum() / scale
