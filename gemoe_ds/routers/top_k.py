"""Static top-k routing, the baseline: every token gets the same k experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from gemoe_ds.moe import losses
from gemoe_ds.moe.context import LossTerm, TokenContext
from gemoe_ds.moe.router import Decision, Router, RoutingSpec
from gemoe_ds.moe.selection import fixed_k, top_k_decision
from gemoe_ds.registry import ConfigModel


class TopKRouter(Router):
    """softmax over all experts in float32, then the k largest, weighted by their raw scores.

    With the backbone's own k and gate this is the backbone's own routing (OLMoE, DeepSeek-V2
    family: not renormalised; Mixtral, Qwen3: renormalised).
    """

    name: ClassVar[str] = "top_k"
    batch_losses: ClassVar[Mapping[str, str] | None] = {
        "load_balance": "balance_weight",
        "entropy": "entropy_target",
    }

    class Config(ConfigModel):
        k: int | None = Field(
            None, ge=1, description="experts a token; default: the backbone's own"
        )
        norm_topk_prob: Literal["backbone", "none", "sum"] = Field(
            "backbone",
            description="sum: divide chosen scores by their sum; backbone: as the base model does",
        )
        balance_weight: float = Field(0.001, ge=0, description="coefficient of the load balance")
        entropy_weight: float = Field(
            0.0, ge=0, description="coefficient of the mean gating entropy (Huang et al. 2024, L_d)"
        )
        entropy_target: float = Field(
            0.0, ge=0, description="bits; a layer whose mean entropy is below it is left alone"
        )

    config: Config

    def __init__(self, config: Config, spec: RoutingSpec) -> None:
        super().__init__(config, spec)
        self.static_k = self.k = fixed_k(config.k, spec)

    def select(self, logits_TE: Tensor, x_TD: Tensor, ctx: TokenContext) -> Decision:
        return top_k_decision(logits_TE, self.k, self.config.norm_topk_prob, self.spec)

    def losses(
        self, decision: Decision, logits_TE: Tensor, ctx: TokenContext
    ) -> dict[str, LossTerm]:
        balance = losses.load_balance(decision.scores_TE, decision.mask_TE, ctx.is_valid_T)
        terms = {"load_balance": LossTerm(balance, self.config.balance_weight)}
        if self.config.entropy_weight:
            valid_T = ctx.is_valid_T
            total = (losses.entropy_bits(decision.scores_TE) * valid_T).sum()
            excess = (total / valid_T.sum().clamp_min(1) - self.config.entropy_target).relu()
            terms["entropy"] = LossTerm(
                excess, self.config.entropy_weight, over_tokens=not self.config.entropy_target
            )
        return terms

    @property
    def max_k(self) -> int:
        return self.k
