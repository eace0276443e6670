"""Threshold: the experts whose score passes one number, the same for all layers and tokens.

Ours, not from a paper. What leaving an expert out costs is about its weight times the norm of its
output, so that one number for the weights loses least at a mean k (see `score`, the same rule
without training), if all tokens matter alike. They do not: what the last layer gives a token that
precedes no answer is read by nobody. So every layer learns what a token's experts are worth, a
factor on its scores where they are compared with the number. Here a mean k stands for the number: a
running histogram of what is compared, in all layers, says which number so many experts pass. In
training every sequence draws a mean k of its own, so that one training serves every budget;
afterwards `mean_k` is the dial.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.context import LossTerm, TokenContext
from gemoe_ds.moe.linear import RouterLinear
from gemoe_ds.moe.per_layer import PerLayer, within
from gemoe_ds.moe.router import Decision, RoutingSpec
from gemoe_ds.moe.score_histogram import NUM_BINS, count_scores, passed_by
from gemoe_ds.moe.score_rule import ScoreRule
from gemoe_ds.moe.selection import divides_by_sum, top_k_mask, topk_weights
from gemoe_ds.moe.step_context import StepContext

GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class ThresholdDecision(Decision):
    """In training with `importance`: which share of its k_high experts a token uses, [T].

    With a soft edge, and with a gradient to the importance alone.
    """

    used_T: Tensor


class ThresholdRouter(ScoreRule):
    """k = the number of scores that pass the threshold of a mean k, from k_low to k_high.

    Until the first step nothing is known of the scores, and every token gets k_high experts.
    """

    name: ClassVar[str] = "threshold"
    dial: ClassVar[str | None] = "mean_k"
    mean_k: float
    scores_H: Tensor  # how many of the tokens' k_high best lie where, in all layers

    class Config(ScoreRule.Config):
        mean_k: Annotated[PerLayer, within(0, math.inf)] = Field(
            4.0,
            description="mean k in evaluation and generation, of tokens such as those of training; "
            "a list: one a layer; `gemoe evaluate --mean-k` finds what gives a mean k of others",
        )
        train_mean_k: tuple[float, float] | None = Field(
            None,
            description="range from which every sequence draws its mean k in training; default: "
            "1.5 to k_high",
        )
        edge: float = Field(
            0.5,
            ge=0,
            allow_inf_nan=False,
            description="width of the threshold's edge, in the logarithm of scores, within which "
            "cross-entropy teaches the gate which experts to use; in training all k_high are then "
            "computed; 0: no such gradient, and only used experts are",
        )
        importance: bool = Field(
            True,
            description="learn what a token's experts are worth in each layer (predictor_lr); "
            "false: all tokens alike, for training on other data than is met later",
        )
        importance_weight: float = Field(
            0.05,
            ge=0,
            allow_inf_nan=False,
            description="coefficient of the mean share of k_high that is used: what makes tokens "
            "leave to others the experts that they do not need",
        )
        importance_limit: float = Field(
            3.0, gt=0, le=8, description="largest logarithm of a token's factor"
        )
        memory: float = Field(
            0.95, ge=0, lt=1, description="what a step leaves of the running histogram"
        )
        hold: bool = Field(
            False,
            description="in evaluation and generation let the threshold follow the scores, so "
            "that their mean k stays at mean_k; a token's k then depends on those before it",
        )
        hold_tokens: int = Field(
            4096, ge=1, description="how many of the last tokens decide with `hold`, about"
        )

    config: Config

    def __init__(self, config: Config, spec: RoutingSpec) -> None:
        super().__init__(config, spec)
        low, high = config.train_mean_k or (min(1.5, self.k_high / 2), self.k_high)
        if not 0 < low <= high <= self.k_high:
            raise ConfigError(
                f"model.router.train_mean_k=[{low:g}, {high:g}] must satisfy 0 < low <= high <= "
                f"{self.k_high} (k_high)"
            )
        if config.importance and not config.edge:
            raise ConfigError(
                "model.router.edge=0: nothing would teach the importance of a token; set "
                "model.router.importance=false as well, or an edge above 0"
            )
        self.train_mean_k = low, high
        self.importance = (
            Importance(spec.d_model, config.importance_limit) if config.importance else None
        )
        self.register_buffer("scores_H", torch.zeros(NUM_BINS))

    def select(self, logits_TE: Tensor, x_TD: Tensor, ctx: TokenContext) -> Decision:
        scores_TE = logits_TE.softmax(-1)
        factor_T1 = None if self.importance is None else self.importance(x_TD)
        log_TE = self._log_of(scores_TE)
        log_TK = self._best(log_TE.detach(), factor_T1)
        self._count(log_TK, ctx)
        log_threshold_T1 = self._log_threshold(ctx).to(log_TK.dtype)
        k_T = (log_TK >= log_threshold_T1).sum(-1).clamp(self.k_low, self.k_high)
        mask_TE = top_k_mask(scores_TE, self.k_high, k_T)
        weights_TE = topk_weights(scores_TE, mask_TE, self.config.norm_topk_prob, self.spec)
        if not self.training or not self.config.edge:
            return Decision(scores_TE, mask_TE, weights_TE)
        # Of value 1 where an expert is used and 0 where it is not, with the slope of a sigmoid.
        above_TE = log_TE - log_threshold_T1
        soft_TE = self._edge(above_TE, factor_T1)
        slope_TE = weights_TE.detach() * (soft_TE - soft_TE.detach())
        weights_TE = torch.where(mask_TE, weights_TE, 0.0) + slope_TE
        best_TE = top_k_mask(scores_TE, self.k_high)
        if factor_T1 is None:
            return Decision(scores_TE, best_TE, weights_TE)
        # Before the first step, when all pass, as if each stood at the threshold.
        above_TE = above_TE.detach().nan_to_num(posinf=self.config.importance_limit)
        used_TE = self._edge(above_TE, factor_T1) * best_TE
        return ThresholdDecision(scores_TE, best_TE, weights_TE, used_TE.sum(-1) / self.k_high)

    def _edge(self, above_TE: Tensor, factor_T1: Tensor | None) -> Tensor:
        """From 0 to 1 about the threshold, [T, E]."""
        if factor_T1 is not None:
            above_TE = above_TE + factor_T1
        return (above_TE / self.config.edge).sigmoid()

    def losses(
        self, decision: Decision, logits_TE: Tensor, ctx: TokenContext
    ) -> dict[str, LossTerm]:
        terms = super().losses(decision, logits_TE, ctx)
        if isinstance(decision, ThresholdDecision):
            valid_T = ctx.is_valid_T
            used = (decision.used_T * valid_T).sum() / valid_T.sum().clamp_min(1)
            terms["used"] = LossTerm(used, self.config.importance_weight, over_tokens=True)
        return terms

    def _best(self, log_TE: Tensor, factor_T1: Tensor | None) -> Tensor:
        """Of the k_high best, falling: what is compared with the threshold, at most 0.

        The weights that they would have if all of them were used, times the token's factor. 0 for
        the first k_low, which pass every threshold.
        """
        log_TK = log_TE.topk(self.k_high, dim=-1).values
        if factor_T1 is not None:
            log_TK = log_TK + factor_T1.detach()
        log_TK[:, : self.k_low] = 0.0
        return log_TK

    def _log_of(self, scores_TE: Tensor) -> Tensor:
        """The scores' logarithms, or those of their shares of the k_high best's sum, [T, E]."""
        log_TE = scores_TE.clamp_min(torch.finfo(scores_TE.dtype).tiny).log()
        if divides_by_sum(self.config.norm_topk_prob, self.spec):
            best_TK = scores_TE.topk(self.k_high, dim=-1).values
            log_TE = log_TE - best_TK.sum(-1, keepdim=True).log()
        return log_TE

    def _log_threshold(self, ctx: TokenContext) -> Tensor:
        """[T, 1] in training, else [1]."""
        if self.training:
            return passed_by(self.scores_H, self._drawn_mean_k(ctx) / self.k_high)[:, None]
        known_H = self._followed(ctx) if self.config.hold else self.scores_H
        return passed_by(known_H, known_H.new_full((1,), self.mean_k / self.k_high))

    def _drawn_mean_k(self, ctx: TokenContext) -> Tensor:
        """Of the sequence of every token, [T]; the same in all layers.

        One number is drawn for the samples that share a loss; their sequences go on from it in
        steps of the golden ratio, which cover the range evenly however many they are.
        """
        cache, (low, high) = ctx.layers[0].cache, self.train_mean_k
        if "mean_k_T" not in cache:
            drawn, number_T = _drawn(ctx)
            place_T = (drawn + number_T.double() * GOLDEN) % 1
            cache["mean_k_T"] = low + (high - low) * place_T
        return cache["mean_k_T"]

    def _count(self, log_TK: Tensor, ctx: TokenContext) -> None:
        if self.training:
            self.record_of(ctx).cache["scores_H"] = count_scores(log_TK, ctx.is_valid_T)
        elif self.config.hold:
            self._followed(ctx)
            fresh_H = ctx.memory["fresh_H"]  # on the device of the first layer
            fresh_H += count_scores(log_TK, ctx.is_valid_T).to(fresh_H.device)

    def _followed(self, ctx: TokenContext) -> Tensor:
        """The running histogram of all layers before this forward; at first that of training."""
        memory, cache = ctx.memory, ctx.layers[0].cache
        if "followed_H" not in cache:  # the first layer of this forward
            most = float(self.config.hold_tokens * self.k_high * len(ctx.layers))
            known_H = memory.get("followed_H", self.scores_H.double() * most)
            known_H = known_H.to(self.scores_H.device)  # the model may have moved
            fresh_H = memory.get("fresh_H", torch.zeros_like(known_H)).to(known_H)
            cache["followed_H"] = known_H * (-fresh_H.sum() / most).exp() + fresh_H
            memory["followed_H"], memory["fresh_H"] = cache["followed_H"], torch.zeros_like(known_H)
        return cache["followed_H"].to(self.scores_H.device)

    def step_counts(self, decision: Decision, ctx: TokenContext) -> dict[str, Tensor]:
        return {"scores_H": self.record_of(ctx).cache["scores_H"]}

    def after_step(self, step_context: StepContext) -> None:
        """All layers get the same histogram, as shares; the first step's as it is."""
        fresh_H = step_context.model["scores_H"]
        total = fresh_H.sum()
        if total > 0:
            memory = self.config.memory if self.scores_H.any() else 0.0
            self.scores_H.lerp_((fresh_H / total).to(self.scores_H), 1 - memory)

    @classmethod
    def shared_by_samples(cls, config: Any) -> dict[str, str]:
        found = super().shared_by_samples(config)
        low, high = config.train_mean_k or (0, 1)
        return found | ({"the mean k that each sequence draws": ""} if low < high else {})

    @property
    def depends_also_on(self) -> str:
        return "the tokens before it (hold: true)" if self.config.hold else ""

    @property
    def dial_ends(self) -> tuple[float, float]:
        return float(self.k_low), float(self.k_high)


def _drawn(ctx: TokenContext) -> tuple[Tensor, Tensor]:
    """What was drawn for each token's group, and the number that its sequence has there, [T]."""
    if ctx.num_groups == 1:
        # The number stays in a tensor of the host, which a graph can hold.
        return torch.rand(()) if ctx.drawn_G is None else ctx.drawn_G[0], ctx.sequence_T
    assert ctx.drawn_G is not None, "whoever asks for groups draws a number for each"
    sequence_GT = ctx.sequence_T.view(ctx.num_groups, -1)
    drawn_G1 = ctx.drawn_G.to(sequence_GT.device)[:, None]
    return drawn_G1.expand_as(sequence_GT).flatten(), (sequence_GT - sequence_GT[:, :1]).flatten()


class Importance(nn.Module):
    """The logarithm of a token's factor, [T, 1], within `limit` below 0; at first alike for all.

    Below 0, as a factor on all tokens alike changes nothing, and no score exceeds 1.
    """

    def __init__(self, d_model: int, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.map = RouterLinear(d_model, 1)
        nn.init.zeros_(self.map.weight)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x_TD: Tensor) -> Tensor:
        raw_T1 = (self.map(x_TD) + self.bias) / self.limit
        factor_T1: Tensor = self.limit * (raw_T1.tanh() - 1)
        return factor_T1
