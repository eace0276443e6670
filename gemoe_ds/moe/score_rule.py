"""Routers whose k follows from the scores of the gate alone: nothing but the gate trains."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from gemoe_ds.moe import losses
from gemoe_ds.moe.context import LossTerm, TokenContext
from gemoe_ds.moe.router import Decision, Router, RoutingSpec
from gemoe_ds.moe.selection import k_range, top_k_mask, topk_weights
from gemoe_ds.registry import ConfigModel


class ScoreRule(Router):
    """The experts with the best scores, as many as the rule `count` says, from k_low to k_high."""

    batch_losses: ClassVar[Mapping[str, str] | None] = {"load_balance": "balance_weight"}

    class Config(ConfigModel):
        k_low: int = Field(1, ge=0, description="smallest k of a token")
        k_high: int | None = Field(None, ge=1, description="largest k; default: the backbone's own")
        norm_topk_prob: Literal["backbone", "none", "sum"] = Field(
            "backbone",
            description="sum: divide chosen scores by their sum; backbone: as the base model does",
        )
        balance_weight: float = Field(0.001, ge=0, description="coefficient of the load balance")

    config: Config

    def __init__(self, config: Config, spec: RoutingSpec) -> None:
        super().__init__(config, spec)
        self.k_low, self.k_high = k_range(config.k_low, config.k_high, spec.top_k, spec)

    @abstractmethod
    def count(self, scores_TE: Tensor, best_TK: Tensor, ctx: TokenContext) -> Tensor:
        """How many experts a token would get, [T]; best_TK are its k_high best scores, falling."""

    def select(self, logits_TE: Tensor, x_TD: Tensor, ctx: TokenContext) -> Decision:
        scores_TE = logits_TE.softmax(-1)
        best_TK = scores_TE.detach().topk(self.k_high, dim=-1).values
        k_T = self.count(scores_TE.detach(), best_TK, ctx).clamp(self.k_low, self.k_high)
        mask_TE = top_k_mask(scores_TE, self.k_high, k_T)
        weights_TE = topk_weights(scores_TE, mask_TE, self.config.norm_topk_prob, self.spec)
        return Decision(scores_TE, mask_TE, weights_TE)

    def losses(
        self, decision: Decision, logits_TE: Tensor, ctx: TokenContext
    ) -> dict[str, LossTerm]:
        balance = losses.load_balance(decision.scores_TE, decision.mask_TE, ctx.is_valid_T)
        return {"load_balance": LossTerm(balance, self.config.balance_weight)}

    @property
    def min_k(self) -> int:
        return self.k_low

    @property
    def max_k(self) -> int:
        return self.k_high
