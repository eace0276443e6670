"""BEAM: top-k proposes, a learned binary mask disposes.

Wu et al. (arXiv 2605.14438), read in summaries; its code (Time-Rune/BEAM) could not be had. From
the paper: a mask router beside the gate, sigmoid(x W_m) cut at 0.5, which multiplies the weights of
the top-k experts; a straight-through gradient; the L1 loss on the masks of the k; load balance of
the gate alone. Our reading: in training closed experts run too, with weight 0, so that the gradient
reaches all k masks, and the L1 loss as well (the derivative of |m| at 0 is taken as that of m);
weights are divided, where they are, before the mask; W_m starts at 0 with a bias that lets all k
through, so that training starts from the backbone's own routing; another cut after training moves
the mean k.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor, nn

from gemoe_ds.moe import losses
from gemoe_ds.moe.context import LossTerm, TokenContext
from gemoe_ds.moe.linear import RouterLinear
from gemoe_ds.moe.per_layer import PerLayer, within
from gemoe_ds.moe.router import Decision, Router, RoutingSpec
from gemoe_ds.moe.selection import fixed_k, top_k_mask, topk_weights
from gemoe_ds.registry import ConfigModel


@dataclass(frozen=True)
class BEAMDecision(Decision):
    """With the top-k experts, bool [T, E], and the mask with its gradient, 0 or 1, [T, E]."""

    top_TE: Tensor
    open_TE: Tensor


class BEAMRouter(Router):
    """The experts of top-k whose mask is open: a token uses 0 to k."""

    name: ClassVar[str] = "beam"
    batch_losses: ClassVar[Mapping[str, str] | None] = {"load_balance": "balance_weight"}
    dial: ClassVar[str | None] = "cut"
    cut: float

    class Config(ConfigModel):
        k: int | None = Field(
            None, ge=1, description="experts that the mask chooses from; default: the backbone's k"
        )
        sparsity_weight: FiniteFloat = Field(
            0.1, ge=0, description="beta: coefficient of the share of the k that is open"
        )
        start: FiniteFloat = Field(
            0.75, gt=0.5, lt=1, description="sigmoid of every mask before training"
        )
        cut: Annotated[PerLayer, within(0, 1)] = Field(
            0.5, description="an expert of top-k is used where the sigmoid of its mask is above it"
        )
        balance_weight: FiniteFloat = Field(
            0.001, ge=0, description="alpha: coefficient of the load balance of top-k"
        )
        norm_topk_prob: Literal["backbone", "none", "sum"] = Field(
            "backbone",
            description="sum: divide the scores of top-k by their sum, before the mask; backbone: "
            "as the base model does",
        )

    config: Config

    def __init__(self, config: Config, spec: RoutingSpec) -> None:
        super().__init__(config, spec)
        self.k = fixed_k(config.k, spec)
        self.mask = Mask(spec.d_model, spec.num_experts, config.start)

    def select(self, logits_TE: Tensor, x_TD: Tensor, ctx: TokenContext) -> Decision:
        scores_TE = logits_TE.softmax(-1)
        top_TE = top_k_mask(scores_TE, self.k) & ctx.is_valid_T[:, None]
        soft_TE = self.mask(x_TD)
        open_TE = (soft_TE > self.cut).to(soft_TE.dtype) + (soft_TE - soft_TE.detach())
        weights_TE = topk_weights(scores_TE, top_TE, self.config.norm_topk_prob, self.spec)
        is_open_TE = top_TE & (open_TE > 0)
        return BEAMDecision(scores_TE, is_open_TE, weights_TE * open_TE, top_TE, open_TE)

    def dispatched(self, decision: Decision) -> Tensor:
        """In training all k, so that what a masked expert would have given reaches its mask."""
        assert isinstance(decision, BEAMDecision)
        return decision.top_TE if self.training else decision.mask_TE

    def losses(
        self, decision: Decision, logits_TE: Tensor, ctx: TokenContext
    ) -> dict[str, LossTerm]:
        assert isinstance(decision, BEAMDecision)
        top_TE, valid_T = decision.top_TE, ctx.is_valid_T
        balance = losses.load_balance(decision.scores_TE, top_TE, valid_T)
        share = (decision.open_TE * top_TE).sum() / (self.k * valid_T.sum().clamp_min(1))
        return {
            "load_balance": LossTerm(balance, self.config.balance_weight),
            "sparsity": LossTerm(share, self.config.sparsity_weight, over_tokens=True),
        }

    @property
    def dial_ends(self) -> tuple[float, float]:
        return 1.0, 0.0

    @property
    def max_k(self) -> int:
        return self.k


class Mask(nn.Module):
    """sigmoid(x W_m + bias), [T, E]."""

    def __init__(self, d_model: int, num_experts: int, start: float) -> None:
        super().__init__()
        self.map = RouterLinear(d_model, num_experts)
        nn.init.zeros_(self.map.weight)
        self.bias = nn.Parameter(torch.full((num_experts,), math.log(start / (1 - start))))

    def forward(self, x_TD: Tensor) -> Tensor:
        soft_TE: Tensor = (self.map(x_TD) + self.bias).sigmoid()
        return soft_TE
