"""Which number so many scores pass: counts of log scores that add up over tokens, layers and ranks.

Shapes: T tokens, K candidates of a token, H bins, S mean ks.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST = -16.0  # log of the score below which all scores are alike
WIDTH = 0.05  # of a bin
NUM_BINS = round(-LOWEST / WIDTH)


def count_scores(log_TK: Tensor, valid_T: Tensor) -> Tensor:
    """counts_H of the candidates of valid tokens, from the smallest scores to a score of 1."""
    bins_TK = ((log_TK - LOWEST) / WIDTH).clamp(0, NUM_BINS - 1).long()
    counts_H = torch.zeros(NUM_BINS, dtype=torch.float64, device=log_TK.device)
    each_TK = valid_T[:, None].double().expand_as(bins_TK)
    return counts_H.index_add_(0, bins_TK.flatten(), each_TK.flatten())


def passed_by(counts_H: Tensor, share_S: Tensor) -> Tensor:
    """The log of the number which such a share of the scores pass, [S].

    Scores lie evenly within their bin. A share of 1 or more, and any where nothing is counted, is
    passed by all: -inf. One of 0 or less by none: +inf.
    """
    passing_H = counts_H.double().flip(0).cumsum(0)  # by how many the bottom of a bin is passed
    wanted_S = share_S.double() * passing_H[-1]
    index_S = torch.searchsorted(passing_H, wanted_S).clamp_max(NUM_BINS - 1)
    within_S = counts_H.double().flip(0)[index_S]
    into_S = 1 - (passing_H[index_S] - wanted_S) / within_S.clamp_min(1e-300)
    log_S = -(index_S + into_S.clamp(0, 1)) * WIDTH
    log_S = log_S.masked_fill(share_S <= 0, torch.inf)
    return log_S.masked_fill((share_S >= 1) | (passing_H[-1] <= 0), -torch.inf).to(share_S.dtype)
