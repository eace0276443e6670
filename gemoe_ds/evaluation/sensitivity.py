"""A budget of experts shared out among the layers by what each loses with fewer (Alloc-L).

Arrays: L MoE layers, K the values of k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from gemoe_ds.evaluation.budget import Budget
from gemoe_ds.moe.router import Router
from gemoe_ds.moe.score_rule import ScoreRule


def spend(
    routers: Sequence[Router],
    mean_k: float,
    loss_LK: np.ndarray,
    measure: Callable[[], Sequence[float]],
) -> Budget:
    """Set the dial of every layer, its own mean k, so that the model's mean is `mean_k`."""
    first = routers[0]
    k_L = tuple(share_out(loss_LK, first.min_k, mean_k))
    budget = Budget(0.0, {str(first.dial): k_L}, loss_LK.size - len(routers) + 2)
    budget.apply(routers)
    return replace(budget, mean_k=float(np.mean(measure())))


def measure_losses(routers: Sequence[Router], loss: Callable[[], float]) -> np.ndarray:
    """loss_LK: with k = k_low..k_high for every token of one layer, and k_high in all others.

    One pass for each but the last column, which is the same for all layers.
    """
    rules = [router for router in routers if isinstance(router, ScoreRule)]
    assert len(rules) == len(routers)
    low, high = rules[0].k_low, rules[0].k_high
    for router in rules:
        router.k_low = high
    loss_LK = np.full((len(rules), high - low + 1), loss())
    for row_K, router in zip(loss_LK, rules, strict=True):
        for k in range(low, high):
            router.k_low = router.k_high = k
            row_K[k - low] = loss()
        router.k_low = router.k_high = high
    for router in rules:
        router.k_low = low
    return loss_LK


def share_out(loss_LK: np.ndarray, k_low: int, mean_k: float) -> list[float]:
    """The k of every layer with the smallest sum of losses, their mean being `mean_k`.

    Whole numbers, by dynamic programming over the layers; what is left of the budget, less than
    one expert, goes to the layer that gains most by one more.
    """
    num_layers, num_k = loss_LK.shape
    budget = (mean_k - k_low) * num_layers  # beyond k_low in every layer
    whole = int(budget + 1e-6)
    best_B = np.full(whole + 1, np.inf)  # smallest loss of the layers so far that spend B
    best_B[0] = 0.0
    choices = []
    for loss_K in loss_LK:
        tried_KB = np.full((num_k, whole + 1), np.inf)
        for k in range(min(num_k, whole + 1)):
            tried_KB[k, k:] = best_B[: whole + 1 - k] + loss_K[k]
        choices.append(tried_KB.argmin(0))
        best_B = tried_KB.min(0)
    more, left = [], whole
    for choice_B in reversed(choices):
        more.append(int(choice_B[left]))
        left -= more[-1]
    more_L = [float(k) for k in reversed(more)]
    rest = budget - whole
    if rest > 1e-6:
        gains = [
            loss_K[int(k)] - loss_K[int(k) + 1] if k + 1 < num_k else -np.inf
            for loss_K, k in zip(loss_LK, more_L, strict=True)
        ]
        more_L[int(np.argmax(gains))] += rest
    return [k_low + k for k in more_L]
