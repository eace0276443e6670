"""Mass: of the backbone's own k, the best experts until they hold a share of those k scores' sum.

Top-P (Huang et al., ACL 2024; see `top_p`) as a rule for a finished model. Training-free.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from gemoe_ds.moe.context import TokenContext
from gemoe_ds.moe.per_layer import PerLayer, within
from gemoe_ds.moe.score_rule import ScoreRule


class MassRouter(ScoreRule):
    """The fewest experts that hold `share` of the k_high best scores' sum, from k_low to k_high."""

    name: ClassVar[str] = "mass"
    dial: ClassVar[str | None] = "share"
    share: float

    class Config(ScoreRule.Config):
        share: Annotated[PerLayer, within(0, 1)] = Field(
            1.0,
            description="share of the k_high best scores' sum (p of Top-P); 1: all k_high are "
            "used; a list: one a layer; `gemoe evaluate --mean-k` finds it",
        )

    config: Config

    def count(self, scores_TE: Tensor, best_TK: Tensor, ctx: TokenContext) -> Tensor:
        before_TK = best_TK.cumsum(-1) - best_TK  # what the better ones hold
        return (before_TK < self.share * best_TK.sum(-1, keepdim=True)).sum(-1)

    @property
    def dial_ends(self) -> tuple[float, float]:
        return 0.0, 1.0
