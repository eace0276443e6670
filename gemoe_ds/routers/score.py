"""Score: of the backbone's own k, the experts whose score is at least a threshold. Training-free.

One threshold for all layers and tokens. Our reasoning: without renormalising, what leaving an
expert out costs is about its weight times the norm of its output, so that one threshold on the
weight loses least at a mean k, over tokens and layers. Where the backbone divides by the sum of the
k chosen scores, the weight is the share of that sum, and the threshold is on this share.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from gemoe_ds.moe.context import TokenContext
from gemoe_ds.moe.per_layer import PerLayer, within
from gemoe_ds.moe.score_rule import ScoreRule
from gemoe_ds.moe.selection import divides_by_sum


class ScoreRouter(ScoreRule):
    """k = the number of scores at or above the threshold, from k_low to k_high."""

    name: ClassVar[str] = "score"
    dial: ClassVar[str | None] = "threshold"
    threshold: float

    class Config(ScoreRule.Config):
        threshold: Annotated[PerLayer, within(0, 1)] = Field(
            0.0,
            description="smallest score of an expert that is used; 0: all k_high are; a list: one "
            "a layer; `gemoe evaluate --mean-k` finds it",
        )
        share: Literal["backbone", "no", "yes"] = Field(
            "backbone",
            description="compare a score's share of the sum of the k_high best, not the score; "
            "backbone: where it renormalises",
        )

    config: Config

    def count(self, scores_TE: Tensor, best_TK: Tensor, ctx: TokenContext) -> Tensor:
        share = self.config.share
        backbone = divides_by_sum(self.config.norm_topk_prob, self.spec)
        if share == "yes" or (share == "backbone" and backbone):
            best_TK = best_TK / best_TK.sum(-1, keepdim=True)
        return (best_TK >= self.threshold).sum(-1)

    @property
    def dial_ends(self) -> tuple[float, float]:
        return 1.0, 0.0
