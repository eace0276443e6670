"""DTop-p: top-p whose threshold a PI controller moves, so that the mean k is what was asked for.

Jin et al. (arXiv 2512.13996); no public code, and of the paper we could read the abstract only.
From it: one threshold p for the whole model, which a proportional-integral controller moves towards
a target of activated experts; a normalisation of the logits that lets layers differ under the
common p. Our reading: the controller's gains, and its error, (target - mean k) / target over the
tokens of a step; p starts at what meets the target on the first step's tokens, as few steps follow;
every layer multiplies its logits by a learned number, at first 1 (`scale`), so that a pretrained
gate starts as it is. `standardise` divides by their deviation over the experts before, for gates
whose scale means nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor, nn

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe import losses
from gemoe_ds.moe.context import LossTerm, TokenContext
from gemoe_ds.moe.router import Decision, Router, RoutingSpec
from gemoe_ds.moe.selection import mass_before, topk_weights
from gemoe_ds.moe.step_context import StepContext
from gemoe_ds.registry import ConfigModel

_BINS = 1000  # of p


@dataclass(frozen=True)
class DTopPDecision(Decision):
    """With what the better experts of a token add up to, [T, E], best expert first."""

    before_TE: Tensor


class DTopPRouter(Router):
    """The smallest number of experts whose scores add up to more than p, at least 1."""

    name: ClassVar[str] = "dtop_p"
    batch_losses: ClassVar[Mapping[str, str] | None] = {"load_balance": "balance_weight"}
    threshold: Tensor  # p as it stands
    error: Tensor  # of the last step

    class Config(ConfigModel):
        target_k: FiniteFloat | None = Field(
            None, gt=0, description="mean k that p is moved towards; default: the backbone's k"
        )
        threshold: float | None = Field(
            None,
            gt=0,
            lt=1,
            description="initial p; default: what meets target_k on the first step's tokens",
        )
        proportional: FiniteFloat = Field(
            0.02, ge=0, description="change of p for a change of the error (target - k) / target"
        )
        integral: FiniteFloat = Field(
            0.04, ge=0, description="change of p a step for an error of 1"
        )
        normalize: Literal["scale", "standardise", "none"] = Field(
            "scale",
            description="scale: logits times a number learned per layer; standardise: divided by "
            "their deviation over the experts before",
        )
        balance_weight: FiniteFloat = Field(
            0.001, ge=0, description="coefficient of the load balance"
        )
        norm_topk_prob: Literal["backbone", "none", "sum"] = Field(
            "backbone",
            description="sum: divide chosen scores by their sum; backbone: as the base model does",
        )

    config: Config

    def __init__(self, config: Config, spec: RoutingSpec) -> None:
        super().__init__(config, spec)
        self.target_k = spec.top_k if config.target_k is None else config.target_k
        if not 1 <= self.target_k < spec.num_experts:
            raise ConfigError(
                f"model.router.target_k={self.target_k:g} must be from 1 (top-p gives every token "
                f"an expert) to less than the backbone's {spec.num_experts} experts"
            )
        self.scale = None if config.normalize == "none" else Scale()
        start = self.target_k / spec.num_experts if config.threshold is None else config.threshold
        self.register_buffer("threshold", torch.tensor(start))
        self.register_buffer("error", torch.tensor(0.0))

    @torch.no_grad()
    def adopt_gate(self, gate_ED: Tensor) -> None:
        """A standardised layer starts at the deviation that the gate gives to tokens of size 1."""
        super().adopt_gate(gate_ED)
        if self.scale is not None and self.config.normalize == "standardise":
            gate_ED = gate_ED.float()
            deviation = (gate_ED - gate_ED.mean(0)).square().sum(1).mean().sqrt()
            self.scale.log.fill_(deviation.clamp_min(1e-6).log())

    def score(self, x_TD: Tensor, ctx: TokenContext) -> Tensor:
        logits_TE = super().score(x_TD, ctx)
        if self.scale is None:
            return logits_TE
        if self.config.normalize == "standardise":
            logits_TE = logits_TE - logits_TE.mean(1, keepdim=True)
            logits_TE = logits_TE * (logits_TE.square().mean(1, keepdim=True) + 1e-5).rsqrt()
        scaled_TE: Tensor = self.scale(logits_TE)
        return scaled_TE

    def select(self, logits_TE: Tensor, x_TD: Tensor, ctx: TokenContext) -> Decision:
        scores_TE = logits_TE.softmax(-1)
        before_TE, order_TE = mass_before(scores_TE.detach())
        is_in_TE = before_TE <= self.threshold
        is_in_TE[:, 0] = True
        mask_TE = torch.zeros_like(is_in_TE).scatter(1, order_TE, is_in_TE)
        weights_TE = topk_weights(scores_TE, mask_TE, self.config.norm_topk_prob, self.spec)
        return DTopPDecision(scores_TE, mask_TE, weights_TE, before_TE)

    def losses(
        self, decision: Decision, logits_TE: Tensor, ctx: TokenContext
    ) -> dict[str, LossTerm]:
        balance = losses.load_balance(decision.scores_TE, decision.mask_TE, ctx.is_valid_T)
        return {"load_balance": LossTerm(balance, self.config.balance_weight)}

    def step_counts(self, decision: Decision, ctx: TokenContext) -> dict[str, Tensor]:
        """Of the tokens also how many experts enter between n / 1000 and (n + 1) / 1000 of p."""
        assert isinstance(decision, DTopPDecision)
        bins_TE = (decision.before_TE * _BINS).long().clamp(0, _BINS - 1)
        valid_TE = ctx.is_valid_T[:, None].expand_as(bins_TE).long()
        # No bincount, nor rows by a mask: a GPU would be waited for.
        entering = bins_TE.new_zeros(_BINS).scatter_add_(0, bins_TE.flatten(), valid_TE.flatten())
        return {
            "active": decision.mask_TE.sum(),
            "tokens": ctx.is_valid_T.sum(),
            "entering": entering,
        }

    def after_step(self, step_context: StepContext) -> None:
        """p goes up where fewer are active than should be, in the mean over all layers."""
        tokens = step_context.model["tokens"]
        if not tokens:
            return
        if step_context.step == 1 and self.config.threshold is None:
            mean_k_G = step_context.model["entering"].cumsum(0) / tokens
            self.threshold.fill_(((mean_k_G < self.target_k).sum() + 1) / _BINS)
        else:
            error = 1 - step_context.model["active"] / tokens / self.target_k
            change = self.config.proportional * (error - self.error)
            self.threshold.add_(change + self.config.integral * error)
            self.error.copy_(error)
        self.threshold.clamp_(1e-4, 1 - 1e-4)

    @property
    def peak_mean_k(self) -> float:
        """The initial p if all scores are equal, and the target."""
        start = self.config.threshold or self.target_k / self.spec.num_experts
        return max(self.target_k, int(start * self.spec.num_experts) + 1)


class Scale(nn.Module):
    """Logits [T, E] times a learned number above 0, at first 1."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(1))

    def forward(self, logits_TE: Tensor) -> Tensor:
        return logits_TE * self.log.exp()
