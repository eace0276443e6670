"""Ratio: of the backbone's own k, the experts whose score is at least a share of the best one's.

NAEE's dynamic skipping (Lu et al., "Not All Experts are Equal", ACL 2024): of two experts the
second is left out where its score is below beta times the first's. From the paper: the rule. Our
reading: for more than two every score is compared with the best; one beta for all layers, where the
paper takes the median of each layer, which `--per-layer` comes near. Training-free.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from gemoe_ds.moe.context import TokenContext
from gemoe_ds.moe.per_layer import PerLayer, within
from gemoe_ds.moe.score_rule import ScoreRule


class RatioRouter(ScoreRule):
    """k = the number of scores at or above ratio * the best score, from k_low to k_high."""

    name: ClassVar[str] = "ratio"
    dial: ClassVar[str | None] = "ratio"
    ratio: float

    class Config(ScoreRule.Config):
        ratio: Annotated[PerLayer, within(0, 1)] = Field(
            0.0,
            description="smallest share of the best score (NAEE's beta); 0: all k_high are used; a "
            "list: one a layer; `gemoe evaluate --mean-k` finds it",
        )

    config: Config

    def count(self, scores_TE: Tensor, best_TK: Tensor, ctx: TokenContext) -> Tensor:
        return (best_TK >= self.ratio * best_TK[:, :1]).sum(-1)

    @property
    def dial_ends(self) -> tuple[float, float]:
        return 1.0, 0.0
