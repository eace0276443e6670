"""LTDR: balance language tokens only; vision tokens with peaked routing get more experts.

Cai, Yang et al. (arXiv 2507.01351 v2); no public code. From the paper: variance of the routing
probabilities (Eq. 9), balance over language tokens (Eq. 10), tail = variance above the mean of the
vision tokens (Eq. 11), more experts for them in training and inference. Our reading: the mean is
taken over the vision tokens of a sample (`mean_over`); Eq. 10 keeps the factor E of Eq. 8; Eq. 12,
as printed a softmax of probabilities (`softmax_p`), means a softmax over the chosen ones (`sum`),
and a backbone that does not renormalise goes on so (`backbone`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe import losses
from gemoe_ds.moe.context import LossTerm, TokenContext
from gemoe_ds.moe.router import Decision, Router, RoutingSpec
from gemoe_ds.moe.selection import top_k_mask, topk_weights
from gemoe_ds.registry import ConfigModel


class LTDRRouter(Router):
    """Top-k for language and ordinary vision tokens, top-`tail_k` for vision tokens of the tail."""

    name: ClassVar[str] = "ltdr"
    batch_losses: ClassVar[Mapping[str, str] | None] = {"load_balance": "balance_weight"}

    class Config(ConfigModel):
        k: int | None = Field(
            None, ge=1, description="experts a token; default: the backbone's own"
        )
        tail_k: int | None = Field(
            None, ge=1, description="k of tail vision tokens; default: 1.5 times `k` (paper: 12)"
        )
        mean_over: Literal["sample", "batch"] = Field(
            "sample", description="vision tokens whose mean variance is the bound of the tail"
        )
        balance_weight: float = Field(0.01, ge=0, description="coefficient of the load balance")
        balance_over: Literal["language", "all"] = Field(
            "language", description="tokens that the load balance sees; all: the paper's ablation"
        )
        norm_topk_prob: Literal["backbone", "none", "sum", "softmax_p"] = Field(
            "backbone", description="weights of the chosen experts (Eq. 12)"
        )

    config: Config

    def __init__(self, config: Config, spec: RoutingSpec) -> None:
        super().__init__(config, spec)
        self.k_head = spec.top_k if config.k is None else config.k
        default = min(spec.num_experts, self.k_head + (self.k_head + 1) // 2)
        self.tail_k = default if config.tail_k is None else config.tail_k
        if not self.k_head <= self.tail_k <= spec.num_experts:
            raise ConfigError(
                f"model.router: k={self.k_head}, tail_k={self.tail_k} must satisfy "
                f"k <= tail_k <= {spec.num_experts} experts"
            )

    def select(self, logits_TE: Tensor, x_TD: Tensor, ctx: TokenContext) -> Decision:
        scores_TE = logits_TE.softmax(-1)
        is_tail_T = self.is_tail(scores_TE.detach(), ctx)
        k_T = torch.where(is_tail_T, self.tail_k, self.k_head)
        mask_TE = top_k_mask(scores_TE, self.tail_k, k_T)
        how = self.config.norm_topk_prob
        if how == "softmax_p":
            weights_TE = scores_TE.masked_fill(~mask_TE, -torch.inf).softmax(-1)
        else:
            weights_TE = topk_weights(scores_TE, mask_TE, how, self.spec)
        return Decision(scores_TE, mask_TE, weights_TE)

    def is_tail(self, scores_TE: Tensor, ctx: TokenContext) -> Tensor:
        """Vision tokens whose variance over the experts is above the mean (Eq. 11), bool [T]."""
        variance_T = (scores_TE - 1 / scores_TE.shape[1]).square().mean(-1)  # scores sum to 1
        vision_T = ctx.is_vision_T & ctx.is_valid_T
        if self.config.mean_over == "batch":
            group_T = torch.zeros_like(ctx.sequence_T)
        else:
            group_T = ctx.sequence_T
        sums_T = torch.zeros_like(variance_T).index_add(0, group_T, variance_T * vision_T)
        counts_T = torch.zeros_like(variance_T).index_add(0, group_T, vision_T.to(sums_T.dtype))
        mean_T = (sums_T / counts_T.clamp_min(1))[group_T]
        # a hair above: equal variances, whose sum is rounded, are no tail
        return vision_T & (variance_T > mean_T * (1 + 1e-5))

    def losses(
        self, decision: Decision, logits_TE: Tensor, ctx: TokenContext
    ) -> dict[str, LossTerm]:
        counted_T = ctx.is_valid_T
        if self.config.balance_over == "language":
            counted_T = counted_T & ~ctx.is_vision_T
        balance = losses.load_balance(decision.scores_TE, decision.mask_TE, counted_T)
        return {"load_balance": LossTerm(balance, self.config.balance_weight)}

    @classmethod
    def bound_to_micro_batch(cls, config: Any) -> str:
        return "the mean of mean_over=batch" if config.mean_over == "batch" else ""

    @property
    def depends_also_on(self) -> str:
        return "the other vision tokens of the sample"

    @property
    def max_k(self) -> int:
        return self.tail_k
