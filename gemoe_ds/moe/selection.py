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
    if how == "sum" or (how == "backbone" and spec.norm_topk_prob):
        return scores_TE / (scores_TE * mask_TE).sum(-1, keepdim=True).clamp_min(1e-20)
    return scores_TE


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
