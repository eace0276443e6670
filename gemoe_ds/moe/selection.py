"""What routers share when they select: masks of the k best, combine weights, the range of k.

Shapes: T tokens, E experts (or columns, with free experts), K candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.router import Decision, RoutingSpec


def top_k_mask(scores_TE: Tensor, k: int, k_T: Tensor | None = None) -> Tensor:
    """The k largest scores of every token, bool [T, E]; of them the first k_T where that is given.

    Raises RuntimeError, as torch does, if k exceeds E.
    """
    top_TK = scores_TE.topk(k, dim=-1).indices
    mask_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
    if k_T is None:
        return mask_TE.scatter_(1, top_TK, True)
    return mask_TE.scatter_(1, top_TK, torch.arange(k, device=k_T.device) < k_T[:, None])


def top_k_decision(logits_TE: Tensor, k: int, how: str, spec: RoutingSpec) -> Decision:
    """The same k for every token, by softmax scores; `how` as in `topk_weights`."""
    scores_TE = logits_TE.softmax(-1)
    mask_TE = top_k_mask(scores_TE, k)
    return Decision(scores_TE, mask_TE, topk_weights(scores_TE, mask_TE, how, spec))


def topk_weights(scores_TE: Tensor, mask_TE: Tensor, how: str, spec: RoutingSpec) -> Tensor:
    """The combine weights: raw scores, or divided by the sum of the chosen ones."""
    if divides_by_sum(how, spec):
        total_T1 = (scores_TE * mask_TE).sum(-1, keepdim=True).clamp_min(1e-20)
        # The others are read by DenseMixer's gradient alone, whose sum is that of the chosen ones.
        return torch.where(mask_TE, scores_TE / total_T1, scores_TE / total_T1.detach())
    return scores_TE


def mass_before(scores_TE: Tensor) -> tuple[Tensor, Tensor]:
    """What the better ones add up to, from the best score to the worst, and the experts' order."""
    sorted_TE, order_TE = scores_TE.sort(stable=True, dim=-1, descending=True)
    return sorted_TE.cumsum(-1) - sorted_TE, order_TE


def share_for_mean_k(before_TE: Tensor, valid_T: Tensor, mean_k: float) -> Tensor:
    """The share p of the mass that `mean_k` experts a token hold on average, a scalar.

    An expert counts where `before_TE`, of `mass_before`, is below p. Bisection on the device,
    without a wait for the host; to 0.001 and no finer, lest it end at a token's own sum, where
    rounding decides.
    """
    low, high = before_TE.new_zeros(()), before_TE.new_ones(())
    count = valid_T.sum().clamp_min(1)
    for _ in range(10):
        middle = (low + high) / 2
        too_many = ((before_TE < middle).sum(1) * valid_T).sum() / count > mean_k
        low, high = torch.where(too_many, low, middle), torch.where(too_many, middle, high)
    return (low + high) / 2


def divides_by_sum(how: str, spec: RoutingSpec) -> bool:
    """Whether the combine weights of a token add up to 1."""
    return how == "sum" or (how == "backbone" and spec.norm_topk_prob)


def fixed_k(k: int | None, spec: RoutingSpec, free: int = 0) -> int:
    """`model.router.k`, by default the backbone's own; ConfigError if there are fewer experts,
    with `free` ones beside the backbone's."""
    k = spec.top_k if k is None else k
    if k > spec.num_experts + free:
        others = f" + {free} free" if free else ""
        raise ConfigError(
            f"model.router.k={k} exceeds the backbone's {spec.num_experts} experts{others}"
        )
    return k


def k_range(k_low: int, k_high: int | None, default: int, spec: RoutingSpec) -> tuple[int, int]:
    """The smallest and the largest k; ConfigError if there are no two of them to choose from."""
    high = default if k_high is None else k_high
    said = f"model.router: k_low={k_low}, k_high={high}"
    if not k_low <= high <= spec.num_experts:
        raise ConfigError(f"{said} must satisfy k_low <= k_high <= {spec.num_experts} experts")
    if k_low == high:
        raise ConfigError(
            f"{said} leave no k to choose; set others (the backbone's own k is {spec.top_k}), "
            "or use router top_k"
        )
    return k_low, high
