"""Entropy: k = round(slope * H + shift), H the gating entropy in bits. Training-free.

GeMoE's teacher (arXiv 2606.26287, Eqs. 8 and 12) as a rule: what its predictor of k learns is an
order by entropy with a margin of 1.2 experts a bit. Our reading; PyPI's adaptive-k-routing also
takes k from the entropy.
"""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from gemoe_ds.moe import losses
from gemoe_ds.moe.context import TokenContext
from gemoe_ds.moe.per_layer import PerLayer
from gemoe_ds.moe.score_rule import ScoreRule


class EntropyRouter(ScoreRule):
    """k = round(slope * H + shift), half to even, from k_low to k_high."""

    name: ClassVar[str] = "entropy"
    dial: ClassVar[str | None] = "shift"
    shift: float

    class Config(ScoreRule.Config):
        slope: float = Field(1.2, ge=0, description="experts for a bit of entropy")
        shift: PerLayer = Field(
            0.0,
            description="experts at no entropy; a list: one a layer; `gemoe evaluate --mean-k` "
            "finds it",
        )

    config: Config

    def count(self, scores_TE: Tensor, best_TK: Tensor, ctx: TokenContext) -> Tensor:
        return (self.config.slope * losses.entropy_bits(scores_TE) + self.shift).round()

    @property
    def dial_ends(self) -> tuple[float, float]:
        most_bits = math.log2(self.spec.num_experts)
        return self.k_low - 1 - self.config.slope * most_bits, self.k_high + 1.0
