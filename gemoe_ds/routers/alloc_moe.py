"""Alloc-MoE: a budget of experts for every layer, spent on the tokens with the best scores.

arXiv 2604.08133 (2026); no released code. From its abstract: layers get budgets by sensitivity
and dynamic programming (Alloc-L; `evaluation/sensitivity.py`), and a layer's budget is spread over
its tokens by routing scores (Alloc-T). From a second-hand note: Alloc-L gives each layer a whole k,
Alloc-T takes the k * T best of the scores of T tokens. Our reading: these are the valid tokens of a
forward, so that what a token gets depends on its batch, and on tokens after it; each keeps k_low
experts, and gets k_high at most; a budget need not be whole. Training-free.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from gemoe_ds.moe.context import TokenContext
from gemoe_ds.moe.per_layer import PerLayer, within
from gemoe_ds.moe.score_rule import ScoreRule
from gemoe_ds.moe.selection import divides_by_sum


class AllocMoERouter(ScoreRule):
    """The k * T best scores of T tokens, of every token from k_low to k_high."""

    name: ClassVar[str] = "alloc_moe"
    dial: ClassVar[str | None] = "k"
    budgets_by_sensitivity: ClassVar[bool] = True
    k: float

    class Config(ScoreRule.Config):
        k: Annotated[PerLayer, within(0, math.inf, above=True)] = Field(
            4.0,
            description="budget: mean experts a token in every forward; a list: one a layer, as "
            "`gemoe evaluate --mean-k` finds by what each layer's experts are worth",
        )

    config: Config

    def count(self, scores_TE: Tensor, best_TK: Tensor, ctx: TokenContext) -> Tensor:
        if divides_by_sum(self.config.norm_topk_prob, self.spec):
            best_TK = best_TK / best_TK.sum(-1, keepdim=True)
        valid_T1 = ctx.is_valid_T[:, None]
        more_TK = best_TK[:, self.k_low :].masked_fill(
            ~valid_T1, -1.0
        )  # beside the k_low that all get
        budget = ((min(self.k, self.k_high) - self.k_low) * valid_T1.sum()).round()
        order_N = more_TK.flatten().argsort(stable=True, descending=True)
        is_in_N = torch.zeros_like(order_N).scatter(
            0, order_N, (torch.arange(len(order_N), device=order_N.device) < budget).long()
        )
        return self.k_low + is_in_N.view(more_TK.shape).sum(1)

    @classmethod
    def bound_to_micro_batch(cls, config: Any) -> str:
        return "a budget of experts that all its tokens share"

    @property
    def depends_also_on(self) -> str:
        return "all tokens of the batch"

    @property
    def dial_ends(self) -> tuple[float, float]:
        return float(self.k_low), float(self.k_high)
