"""GeMoE: each token's number of experts follows its gating entropy (arXiv 2606.26287, ECCV 2026).

Equation numbers are the paper's. Where the text leaves a choice open, the default below is the
reading that its published numbers support, and the alternative is a switch; docs/routers.md
gives the reasons one by one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe import losses
from gemoe_ds.moe.context import LossTerm, TokenContext
from gemoe_ds.moe.host_copy import Remembered
from gemoe_ds.moe.linear import RouterLinear, fused_linear
from gemoe_ds.moe.monotonic import monotonic_loss
from gemoe_ds.moe.per_layer import PerLayer, within
from gemoe_ds.moe.router import Decision, Router, RoutingSpec
from gemoe_ds.moe.selection import k_range, top_k_mask, topk_weights
from gemoe_ds.moe.step_context import StepContext
from gemoe_ds.registry import ConfigModel


@dataclass(frozen=True)
class GeMoEDecision(Decision):
    """A decision with the expected k before rounding (Eq. 10), [T], differentiable."""

    k_soft_T: Tensor


class GeMoERouter(Router):
    """Top-k by scores with k predicted from the token (Eqs. 8 to 13).

    The predictor (EAP) is one linear layer on the router's own input. It learns from the
    monotonic loss alone: with ranks below k as the mask, cross-entropy has no gradient to k. What
    it learns of training's tokens need not hold for others; `predictor_input: entropy` gives it
    the entropy itself instead, which does.
    """

    name: ClassVar[str] = "gemoe"
    batch_losses: ClassVar[Mapping[str, str] | None] = {
        "monotonic": "monotonic_weight",
        "load_balance": "balance_weight",
        "budget": "budget_k",
    }
    added: ClassVar[Mapping[str, Any]] = {"predictor_input": "token"}
    dial: ClassVar[str | None] = "k_shift"
    k_shift: float
    mean_entropy: Tensor
    is_centred: Tensor

    class Config(ConfigModel):
        k_low: int = Field(1, ge=0, description="smallest k that the predictor may give")
        k_high: int | None = Field(None, ge=1, description="largest k; default: the backbone's own")
        monotonic_weight: float = Field(
            1.0, ge=0, description="coefficient of the monotonic loss (lambda_1 of Eq. 13)"
        )
        balance_weight: float = Field(
            0.001, ge=0, description="coefficient of the load balance (lambda_2 of Eq. 13)"
        )
        predictor_input: Literal["token", "entropy", "both"] = Field(
            "token",
            description="token: a linear layer on it (paper); entropy: k rises with the token's "
            "entropy by construction, and does so for other data than the training's; both: sum",
        )
        margin_per_bit: float = Field(
            1.2, ge=0, description="margin of Eq. 12 per bit of entropy (A1)"
        )
        margin_constant: float = Field(0.0, ge=0, description="margin added to every pair (A1)")
        correlation: Literal["positive", "negative"] = Field(
            "positive",
            description="of entropy and k; negative: the paper's reversed ablation (Table 5)",
        )
        detach_entropy: bool = Field(
            True, description="no gradient of the monotonic loss to the entropy (A6)"
        )
        detach_x: bool = Field(
            False, description="no gradient of the monotonic loss to lower layers (A11)"
        )
        ce_to_k: Literal["none", "soft_mask"] = Field(
            "none", description="soft_mask: cross-entropy trains k as well (A4, an experiment)"
        )
        soft_mask_temperature: float = Field(
            1.0, gt=0, description="width of the soft mask, in experts"
        )
        norm_topk_prob: Literal["backbone", "none", "sum"] = Field(
            "backbone",
            description="sum: divide chosen scores by their sum; backbone: as the base model does "
            "(A12)",
        )
        budget_k: float | None = Field(
            None, gt=0, description="target mean k over all layers; null: no target"
        )
        budget_weight: float = Field(
            1.0, ge=0, description="coefficient of (mean expected k - budget_k)^2; not in the paper"
        )
        k_scale: Annotated[PerLayer, within(0, math.inf, above=True)] = Field(
            1.0, description="factor on the expected k, before rounding; a list: one a layer"
        )
        k_shift: PerLayer = Field(
            0.0,
            description="added after that, before rounding; a list: one a layer; `gemoe evaluate "
            "--mean-k` finds it",
        )

    config: Config

    def __init__(self, config: Config, spec: RoutingSpec) -> None:
        super().__init__(config, spec)
        self.k_scale = self.of_this_layer("k_scale")
        self.k_low, self.k_high = k_range(config.k_low, config.k_high, spec.top_k, spec)
        if config.budget_k is not None and not self.k_low <= config.budget_k <= self.k_high:
            raise ConfigError(
                f"model.router.budget_k={config.budget_k} is not in the range of k, "
                f"{self.k_low} to {self.k_high}"
            )
        # Expert assignment predictor; default init, not zeros, which would tie every k (A5).
        num_choices = self.k_high - self.k_low + 1
        self.eap: RouterLinear | None = None
        if config.predictor_input != "entropy":
            self.eap = RouterLinear(spec.d_model, num_choices)
        self.entropy_map: EntropyMap | None = None
        if config.predictor_input != "token":
            self.entropy_map = EntropyMap(num_choices)
            self.register_buffer("mean_entropy", torch.tensor(math.log2(spec.num_experts) / 2))
            self.register_buffer("is_centred", torch.tensor(0.0))
        self._is_centred = Remembered()
        # The ablation without any loss on k leaves the predictor at its random start.
        has_budget = config.budget_k is not None and config.budget_weight > 0
        trains = config.monotonic_weight > 0 or config.ce_to_k != "none" or has_budget
        for predictor in (self.eap, self.entropy_map):
            if predictor is not None:
                predictor.requires_grad_(trains)

    def score(self, x_TD: Tensor, ctx: TokenContext) -> Tensor:
        if self.eap is None or self.config.detach_x:
            return super().score(x_TD, ctx)
        logits_TE, self.record_of(ctx).cache["k_logits"] = fused_linear(x_TD, self.gate, self.eap)
        return logits_TE

    def select(self, logits_TE: Tensor, x_TD: Tensor, ctx: TokenContext) -> GeMoEDecision:
        scores_TE = logits_TE.softmax(-1)
        k_logits_TK = self.record_of(ctx).cache.pop("k_logits", None)
        k_soft_T = self.predict_k(x_TD, scores_TE, k_logits_TK)
        k_T = k_soft_T.detach() * self.k_scale + self.k_shift
        k_T = k_T.round().clamp(self.k_low, self.k_high)  # Eq. 11, half to even (A15)
        mask_TE = top_k_mask(scores_TE, self.k_high, k_T)
        weights_TE = topk_weights(scores_TE, mask_TE, self.config.norm_topk_prob, self.spec)
        if self.config.ce_to_k == "soft_mask":
            weights_TE = self._with_soft_mask(weights_TE, scores_TE, k_soft_T)
        return GeMoEDecision(scores_TE, mask_TE, weights_TE, k_soft_T)

    def predict_k(
        self, x_TD: Tensor, scores_TE: Tensor | None = None, logits_TK: Tensor | None = None
    ) -> Tensor:
        """k_soft = sum_k k softmax(W_a x)_k over k_low..k_high (Eqs. 9, 10), float32 [T].

        `scores_TE` is read where the predictor has the entropy as its input; W_a x is `logits_TK`
        where that is known already.
        """
        if self.eap is not None and logits_TK is None:
            logits_TK = self.eap(x_TD.detach() if self.config.detach_x else x_TD)
        if self.entropy_map is not None:
            assert scores_TE is not None
            entropy_T = losses.entropy_bits(scores_TE.detach()) - self.mean_entropy
            of_entropy_TK: Tensor = self.entropy_map(self._guide(entropy_T))
            logits_TK = of_entropy_TK if logits_TK is None else logits_TK + of_entropy_TK
        assert logits_TK is not None
        return self._expected_k(logits_TK)

    def _guide(self, entropy_T: Tensor) -> Tensor:
        """What k rises with: the entropy, or its opposite in the reversed ablation."""
        return -entropy_T if self.config.correlation == "negative" else entropy_T

    def _expected_k(self, logits_TK: Tensor) -> Tensor:
        k_K = torch.arange(
            self.k_low, self.k_high + 1, device=logits_TK.device, dtype=logits_TK.dtype
        )
        k_soft_T: Tensor = logits_TK.softmax(-1) @ k_K
        return k_soft_T

    def losses(
        self, decision: Decision, logits_TE: Tensor, ctx: TokenContext
    ) -> dict[str, LossTerm]:
        assert isinstance(decision, GeMoEDecision)
        config, valid_T = self.config, ctx.is_valid_T
        entropy_T = losses.entropy_bits(decision.scores_TE)  # Eq. 8
        if config.detach_entropy:
            entropy_T = entropy_T.detach()
        monotonic = monotonic_loss(  # Eq. 12
            self._guide(entropy_T),
            decision.k_soft_T,
            valid_T,
            slope=config.margin_per_bit,
            constant=config.margin_constant,
        )
        balance = losses.load_balance(decision.scores_TE, decision.mask_TE, valid_T)  # Eq. 3
        terms = {
            "monotonic": LossTerm(monotonic, config.monotonic_weight),
            "load_balance": LossTerm(balance, config.balance_weight),
        }
        if config.budget_k is not None:
            mean_k = (decision.k_soft_T * valid_T).sum() / valid_T.sum().clamp_min(1)
            self.record_of(ctx).cache["mean_k"] = mean_k
            if self.spec.slot == len(ctx.layers) - 1:  # all layers share one budget
                mean_k = torch.stack([record.cache["mean_k"] for record in ctx.layers]).mean()
                budget = (mean_k - config.budget_k).square()
                terms["budget"] = LossTerm(budget, config.budget_weight)
        return terms

    def step_counts(self, decision: Decision, ctx: TokenContext) -> dict[str, Tensor]:
        if self.entropy_map is None or self._is_centred.of(self.is_centred):
            return {}
        entropy_T = losses.entropy_bits(decision.scores_TE) * ctx.is_valid_T
        return {"entropy": entropy_T.sum(), "tokens": ctx.is_valid_T.sum()}

    def after_step(self, step_context: StepContext) -> None:
        """The layer's mean entropy in the first step is where the middle k will be."""
        layer = step_context.layer
        if self.entropy_map is None or self._is_centred.of(self.is_centred) or layer["tokens"] == 0:
            return
        self.mean_entropy.copy_(layer["entropy"] / layer["tokens"])
        self.is_centred.fill_(1.0)

    def _with_soft_mask(self, weights_TE: Tensor, scores_TE: Tensor, k_soft_T: Tensor) -> Tensor:
        """The same weights, times a factor of value 1 whose gradient raises or lowers k."""
        top_TK = scores_TE.topk(self.k_high, dim=-1).indices
        rank_K = torch.arange(self.k_high, device=scores_TE.device)
        distance_TK = k_soft_T[:, None] - rank_K - 0.5
        soft_TK = (distance_TK / self.config.soft_mask_temperature).sigmoid()
        factor_TE = torch.ones_like(weights_TE).scatter(1, top_TK, 1 + soft_TK - soft_TK.detach())
        return weights_TE * factor_TE

    @property
    def dial_ends(self) -> tuple[float, float]:
        width = self.k_high - self.k_low
        return -width - 1, width + 1

    @property
    def min_k(self) -> int:
        return self.k_low

    @property
    def max_k(self) -> int:
        return self.k_high


class EntropyMap(nn.Module):
    """Logits of the K choices, [T, K], choice n's being n slope h + bias_n of a number h per token.

    The slope is positive, so that the expected choice rises with h: its derivative is the slope
    times the variance of the choice. It starts at 1 where h = 0, which gives the middle choice.
    """

    def __init__(self, num_choices: int) -> None:
        super().__init__()
        self.num_choices = num_choices
        variance = (num_choices**2 - 1) / 12  # of choices that are equally likely
        self.log_slope = nn.Parameter(torch.tensor([1 / variance]).log())
        self.bias_K = nn.Parameter(torch.zeros(num_choices))

    def forward(self, h_T: Tensor) -> Tensor:
        choice_K = torch.arange(self.num_choices, device=h_T.device, dtype=h_T.dtype)
        return h_T[:, None] * choice_K * self.log_slope.exp() + self.bias_K
