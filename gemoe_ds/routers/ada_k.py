"""Ada-K: an allocator samples every token's k and learns from the reward, by PPO.

Yue et al. (ICLR 2025); its repository is a README. From the paper: a linear allocator with a
softmax over 1..E, everything else frozen; reward = log-probability of the true token, less that of
a second forward with the default k; clipped ratio, two updates a batch, the regulariser 3e-3 * mean
expected k; "P-Warm": first the allocator learns to give as many experts as hold a share p of the
router's mass, p such that the mean is the default k; learning rate 1e-3. Second-hand: argmax at
inference. Not in the paper: gamma and epsilon (1 and 0.2 here). Our reading, for vision-language
data, in which few tokens are targets: one that is none gets the mean reward of its sequence
(`credit`), as its k shows in the answer. And for a k_high below E, which the paper has not: p is
found on counts from 1 to E, as there, and the labels are cut to k_low..k_high afterwards. Found on
cut counts, p would be 1 and every label k_high, wherever k_high is the default k or less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.context import LossTerm, Rollout, TokenContext
from gemoe_ds.moe.host_copy import Remembered
from gemoe_ds.moe.linear import RouterLinear
from gemoe_ds.moe.router import Decision, Router, RoutingSpec
from gemoe_ds.moe.selection import k_range, mass_before, share_for_mean_k, topk_weights
from gemoe_ds.moe.step_context import StepContext
from gemoe_ds.registry import ConfigModel

SAMPLED, DEFAULT = "sampled", "default"


@dataclass(frozen=True)
class AdaKDecision(Decision):
    """With the allocator's log-probabilities of k_low..k_high, [T, K]."""

    log_p_TK: Tensor


class AdaKRouter(Router):
    """Top-k by the frozen gate's scores; k from the allocator."""

    name: ClassVar[str] = "ada_k"
    batch_losses: ClassVar[Mapping[str, str] | None] = {}
    weighs_all = False
    warm_left: Tensor

    class Config(ConfigModel):
        k_low: int = Field(1, ge=1)
        k_high: int | None = Field(None, ge=1, description="largest k; null: all experts (paper)")
        warm_steps: int = Field(100, ge=0, description="steps of P-Warm before PPO")
        warm_top_p: float | None = Field(
            None,
            gt=0,
            lt=1,
            description="p of P-Warm; null: the p that gives `warm_mean_k` on average",
        )
        warm_mean_k: float | None = Field(
            None,
            gt=0,
            description="mean k of P-Warm before it is cut to k_low..k_high; null: the backbone's "
            "k (paper), or the end of the range that is nearest to it",
        )
        updates: int = Field(2, ge=1, description="PPO updates per batch")
        clip: float = Field(0.2, gt=0, description="epsilon of PPO")
        gamma: float = Field(1.0, gt=0, le=1, description="discount per layer below the last")
        regulariser: float = Field(
            3e-3, ge=0, description="coefficient of the mean expected k (lambda)"
        )
        credit: Literal["sequence", "token"] = Field(
            "sequence",
            description="reward of tokens without a target. sequence: the mean of their sequence; "
            "token: none",
        )
        norm_topk_prob: Literal["backbone", "none", "sum"] = Field(
            "backbone",
            description="sum: divide chosen scores by their sum; backbone: as the base model does "
            "(paper: sum)",
        )

    config: Config

    def __init__(self, config: Config, spec: RoutingSpec) -> None:
        super().__init__(config, spec)
        self.k_low, self.k_high = k_range(config.k_low, config.k_high, spec.num_experts, spec)
        self.warm_mean_k = _warm_mean_k(config, self.k_low, self.k_high, spec)
        self.updates_per_batch = config.updates
        self.gate.requires_grad_(False)
        self.allocator = RouterLinear(spec.d_model, self.k_high - self.k_low + 1)
        self.register_buffer("warm_left", torch.tensor(float(config.warm_steps * config.updates)))
        self._warm_left = Remembered()

    def rollouts(self) -> tuple[str, ...]:
        return () if self._warm_left.of(self.warm_left) > 0 else (SAMPLED, DEFAULT)

    def select(self, logits_TE: Tensor, x_TD: Tensor, ctx: TokenContext) -> AdaKDecision:
        scores_TE = logits_TE.softmax(-1)
        log_p_TK = self.allocator(x_TD.detach()).log_softmax(-1)
        k_T = self._choose(log_p_TK, ctx)
        ranks_TE = scores_TE.argsort(stable=True, dim=-1, descending=True).argsort(-1)
        mask_TE = ranks_TE < k_T[:, None]
        weights_TE = topk_weights(scores_TE, mask_TE, self.config.norm_topk_prob, self.spec)
        return AdaKDecision(scores_TE, mask_TE, weights_TE, log_p_TK)

    def _choose(self, log_p_TK: Tensor, ctx: TokenContext) -> Tensor:
        """k of every token: sampled, replayed, the default, or the most likely one; int64 [T]."""
        default_T = torch.full_like(log_p_TK[:, 0], self.spec.top_k, dtype=torch.int64)
        if ctx.rollout == SAMPLED:
            # As torch.multinomial draws it, which waits to see whether the numbers are good ones.
            p_TK = log_p_TK.exp()
            choice_T = (p_TK / torch.empty_like(p_TK).exponential_()).argmax(1)
            log_p_T = log_p_TK.gather(1, choice_T[:, None]).squeeze(1)
            self.record_of(ctx).cache |= {"choice_T": choice_T, "log_p_T": log_p_T}
            return choice_T + self.k_low
        if SAMPLED in ctx.rolled_out:
            replayed_T = ctx.rolled_out[SAMPLED].cache[self.spec.slot]["choice_T"]
            return replayed_T + self.k_low
        if ctx.rollout == DEFAULT or self.training:
            return default_T
        return log_p_TK.argmax(1) + self.k_low

    def losses(
        self, decision: Decision, logits_TE: Tensor, ctx: TokenContext
    ) -> dict[str, LossTerm]:
        assert isinstance(decision, AdaKDecision)
        valid_T = ctx.is_valid_T
        count = valid_T.sum().clamp_min(1)
        log_p_TK = decision.log_p_TK
        if SAMPLED not in ctx.rolled_out:
            wanted_T = self._warm_k(decision.scores_TE, valid_T) - self.k_low
            nll_T = torch.nn.functional.nll_loss(log_p_TK, wanted_T, reduction="none")
            return {"warm": LossTerm((nll_T * valid_T).sum() / count, 1.0, over_tokens=True)}
        sampled, default = ctx.rolled_out[SAMPLED], ctx.rolled_out[DEFAULT]
        old = sampled.cache[self.spec.slot]
        advantage_T = self._advantage(sampled, default, ctx)
        log_p_T = log_p_TK.gather(1, old["choice_T"][:, None]).squeeze(1)
        ratio_T = (log_p_T - old["log_p_T"]).exp()
        clipped_T = ratio_T.clamp(1 - self.config.clip, 1 + self.config.clip)
        gain_T = torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)
        k_K = torch.arange(self.k_low, self.k_high + 1, device=log_p_TK.device)
        expected_T = log_p_TK.exp() @ k_K.to(log_p_TK.dtype)
        return {
            "policy": LossTerm(-(gain_T * valid_T).sum() / count, 1.0, over_tokens=True),
            "expected_k": LossTerm(
                (expected_T * valid_T).sum() / count, self.config.regulariser, over_tokens=True
            ),
        }

    def _advantage(self, sampled: Rollout, default: Rollout, ctx: TokenContext) -> Tensor:
        """gamma^(L-l) (R(sampled k) - R(default k)), [T]; 0 for what gets no reward."""
        gain_T = sampled.log_p_T - default.log_p_T
        scored_T = sampled.is_scored_T
        if self.config.credit == "sequence":
            zeros_T = torch.zeros_like(gain_T)
            sums_T = zeros_T.index_add(0, ctx.sequence_T, gain_T * scored_T)
            counts_T = zeros_T.index_add(0, ctx.sequence_T, scored_T.to(gain_T.dtype))
            mean_T = (sums_T / counts_T.clamp_min(1))[ctx.sequence_T]
            gain_T = torch.where(scored_T, gain_T, mean_T)
        discount = self.config.gamma ** (len(ctx.layers) - 1 - self.spec.slot)
        return gain_T * discount

    @torch.no_grad()
    def _warm_k(self, scores_TE: Tensor, valid_T: Tensor) -> Tensor:
        """How many experts hold a share p of the mass, cut to k_low..k_high, int64 [T]."""
        before_TE, _ = mass_before(scores_TE)
        p: float | Tensor | None = self.config.warm_top_p
        if p is None:
            p = share_for_mean_k(before_TE, valid_T, self.warm_mean_k)
        return (before_TE < p).sum(1).clamp(self.k_low, self.k_high)

    def after_step(self, step_context: StepContext) -> None:
        self.warm_left.sub_(1).clamp_(min=0)  # once an update, of which a step has several

    @classmethod
    def bound_to_micro_batch(cls, config: Any) -> str:
        return "the k that are drawn for it, and the p of P-Warm"

    @property
    def max_k(self) -> int:
        """In training the default k is among those that are chosen, be it above k_high."""
        return max(self.k_high, self.spec.top_k) if self.training else self.k_high

    @property
    def peak_mean_k(self) -> float:
        """The default k, or that of an allocator that prefers none."""
        return min(self.max_k, max(self.spec.top_k, (self.k_low + self.k_high) / 2))


def _warm_mean_k(config: AdaKRouter.Config, k_low: int, k_high: int, spec: RoutingSpec) -> float:
    """The mean of P-Warm's counts; ConfigError for one whose labels would all be the same."""
    if config.warm_mean_k is None:
        return min(max(spec.top_k, k_low), k_high)
    if config.warm_top_p is not None:
        raise ConfigError(
            f"model.router: warm_top_p={config.warm_top_p:g} and "
            f"warm_mean_k={config.warm_mean_k:g} both set P-Warm's labels; give one of them"
        )
    if not k_low < config.warm_mean_k <= k_high:
        raise ConfigError(
            f"model.router.warm_mean_k={config.warm_mean_k:g} must be above k_low={k_low} and at "
            f"most k_high={k_high}: else P-Warm gives most tokens the same k"
        )
    return config.warm_mean_k
