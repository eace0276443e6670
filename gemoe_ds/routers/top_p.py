"""Top-P: experts in the order of their scores until these add up to a threshold.

Huang et al., "Harder Tasks Need More Experts" (ACL 2024); released code: inference only. From the
paper: the rule, raw scores as weights, L_d, its coefficients. From the code: `sum > threshold`, so
that the expert which crosses it is in (the paper writes >=: `strict: false`). Our reading: the
learned threshold of GeMoE's comparison ("a learnable module adjusts the threshold"), whose gradient
comes through a soft mask of value 1; it can be set after the first step to give `start_k`, for at
a pretrained gate one p means another k in every layer, and a threshold travels slowly; L_b on the
project's common scale (docs/routers.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe import losses
from gemoe_ds.moe.context import LossTerm, TokenContext
from gemoe_ds.moe.host_copy import Remembered
from gemoe_ds.moe.linear import RouterLinear
from gemoe_ds.moe.router import Decision, Router, RoutingSpec
from gemoe_ds.moe.selection import mass_before, share_for_mean_k, topk_weights
from gemoe_ds.moe.step_context import StepContext
from gemoe_ds.registry import ConfigModel


class TopPRouter(Router):
    """The smallest number of experts whose scores add up to more than the threshold, at least 1."""

    name: ClassVar[str] = "top_p"
    batch_losses: ClassVar[Mapping[str, str] | None] = {"load_balance": "balance_weight"}
    is_calibrated: Tensor

    class Config(ConfigModel):
        threshold: float = Field(
            0.4, gt=0, lt=1, description="p; the initial value of a learned one"
        )
        learn: Literal["no", "layer", "token"] = Field(
            "no",
            description="no: fixed p; layer: one learned per layer; token: one predicted per token",
        )
        start_k: float | None = Field(
            None, gt=1, description="mean k of a learned p after the first step; null: `threshold`"
        )
        temperature: float = Field(
            0.1, gt=0, description="width of the soft mask that trains a learned threshold"
        )
        strict: bool = Field(True, description="sum > p (code); false: sum >= p (paper)")
        max_k: int | None = Field(None, ge=1, description="largest k of a token; null: no limit")
        balance_weight: float = Field(0.01, ge=0, description="coefficient of the load balance")
        entropy_weight: float = Field(
            1e-4, ge=0, description="coefficient of L_d, the mean entropy of the scores in nats"
        )
        norm_topk_prob: Literal["backbone", "none", "sum"] = Field(
            "backbone",
            description="sum: divide chosen scores by their sum; backbone: as the base model does "
            "(paper: none)",
        )

    config: Config

    def __init__(self, config: Config, spec: RoutingSpec) -> None:
        super().__init__(config, spec)
        self.most = min(config.max_k or spec.num_experts, spec.num_experts)
        if config.start_k is not None:
            self._check_start(config.start_k)
            self.register_buffer("is_calibrated", torch.tensor(0.0))
            self._is_calibrated = Remembered()
        self.threshold = (
            None
            if config.learn == "no"
            else Threshold(spec.d_model, config.threshold, of_token=config.learn == "token")
        )

    def select(self, logits_TE: Tensor, x_TD: Tensor, ctx: TokenContext) -> Decision:
        scores_TE = logits_TE.softmax(-1)
        before_TE, order_TE = mass_before(scores_TE)
        threshold: float | Tensor = self.config.threshold
        if self.threshold is not None:
            threshold = self.threshold(x_TD)
        is_in_TE = before_TE <= threshold if self.config.strict else before_TE < threshold
        is_in_TE[:, 0] = True
        is_in_TE[:, self.most :] = False
        mask_TE = torch.zeros_like(is_in_TE).scatter(1, order_TE, is_in_TE)
        weights_TE = topk_weights(scores_TE, mask_TE, self.config.norm_topk_prob, self.spec)
        if self.threshold is not None:
            soft_TE = ((threshold - before_TE.detach()) / self.config.temperature).sigmoid()
            factor_TE = 1 + soft_TE - soft_TE.detach()
            weights_TE = weights_TE * torch.ones_like(weights_TE).scatter(1, order_TE, factor_TE)
        return Decision(scores_TE, mask_TE, weights_TE)

    def losses(
        self, decision: Decision, logits_TE: Tensor, ctx: TokenContext
    ) -> dict[str, LossTerm]:
        valid_T = ctx.is_valid_T
        balance = losses.load_balance(decision.scores_TE, decision.mask_TE, valid_T)
        entropy_T = losses.entropy_bits(decision.scores_TE) * math.log(2)
        entropy = (entropy_T * valid_T).sum() / valid_T.sum().clamp_min(1)
        return {
            "load_balance": LossTerm(balance, self.config.balance_weight),
            "entropy": LossTerm(entropy, self.config.entropy_weight, over_tokens=True),
        }

    def step_counts(self, decision: Decision, ctx: TokenContext) -> dict[str, Tensor]:
        if self.config.start_k is None or self._is_calibrated.of(self.is_calibrated):
            return {}
        before_TE = mass_before(decision.scores_TE)[0][:, : self.most]
        tokens = ctx.is_valid_T.sum()
        share = share_for_mean_k(before_TE, ctx.is_valid_T, self.config.start_k)
        return {"tokens": tokens, "share": share * tokens}

    def after_step(self, step_context: StepContext) -> None:
        layer = step_context.layer
        if self.config.start_k is None or self._is_calibrated.of(self.is_calibrated):
            return
        if layer["tokens"] == 0:
            return
        assert self.threshold is not None
        share = layer["share"] / layer["tokens"]
        step_context.assign_(self.threshold.bias, share.logit().reshape(1))
        self.is_calibrated.fill_(1.0)

    def _check_start(self, start_k: float) -> None:
        if self.config.learn == "no":
            raise ConfigError(
                f"model.router.start_k={start_k:g} is where a learned threshold starts; set "
                "learn=layer or learn=token too, or give a fixed one by threshold"
            )
        if start_k >= self.most:
            raise ConfigError(
                f"model.router.start_k={start_k:g} must be below the largest k, {self.most} "
                "(max_k, or all experts)"
            )

    @property
    def max_k(self) -> int:
        return self.most

    @property
    def peak_mean_k(self) -> float:
        """If all scores are equal; of a learned threshold, where it starts."""
        first = min(self.most, int(self.config.threshold * self.spec.num_experts) + 1)
        return max(first, self.config.start_k or 0)


class Threshold(nn.Module):
    """A learned threshold in (0, 1), [T, 1]: sigmoid of a bias, plus a linear map of the token."""

    def __init__(self, d_model: int, start: float, *, of_token: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([math.log(start / (1 - start))]))
        self.map = RouterLinear(d_model, 1) if of_token else None
        if self.map is not None:
            nn.init.zeros_(self.map.weight)

    def forward(self, x_TD: Tensor) -> Tensor:
        raw_T1 = self.bias.expand(x_TD.shape[0], 1)
        return (raw_T1 if self.map is None else raw_T1 + self.map(x_TD)).sigmoid()
