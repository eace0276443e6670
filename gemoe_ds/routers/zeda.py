"""ZEDA: zero experts in a finished mixture, one balance between them and the real ones as groups.

Lv et al. (arXiv 2605.18643), read in its released code (TsinghuaC3I/ZEDA) and its README. From
there: half as many zero experts as real ones, their gate rows drawn around the real rows dimension
by dimension, top-k over all, the group balance loss with its 0.1 and w = 2, which asks for half of
the experts; where the backbone divides weights by their sum, that of all chosen, zero experts
included. Our reading, for frozen experts: a backbone that does not divide keeps its own scale, the
softmax over the real experts (the code's softmax over all is `raw`).

It trains in two stages that distil the frozen original: on text that the original wrote, then, at
a quarter of the learning rate, on text that the student wrote. The router and its loss are the same
in both; where the text comes from is no matter of a router.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor

from gemoe_ds.moe.context import LossTerm, TokenContext
from gemoe_ds.moe.free_top_k import FreeTopK
from gemoe_ds.moe.router import Decision, RoutingSpec
from gemoe_ds.moe.selection import divides_by_sum
from gemoe_ds.registry import ConfigModel


class ZEDARouter(FreeTopK):
    """Top-k over E real and M zero experts: a token uses 0 to k real ones."""

    name: ClassVar[str] = "zeda"
    batch_losses: ClassVar[Mapping[str, str] | None] = {"group_balance": "balance_weight"}

    class Config(ConfigModel):
        zeros: int | None = Field(
            None, ge=1, description="zero experts; default: half as many as real experts"
        )
        zero_weight: FiniteFloat = Field(
            2.0,
            gt=0,
            description="w: the balance loss asks for a mean k of k E / (E + w M), with E real and "
            "M zero experts; default: half of k",
        )
        k: int | None = Field(
            None, ge=1, description="choices a token, zero experts included; default: backbone's k"
        )
        balance_weight: FiniteFloat = Field(
            0.1, ge=0, description="coefficient of the balance between the two groups"
        )
        norm_topk_prob: Literal["backbone", "none", "all", "raw"] = Field(
            "backbone",
            description="divide scores by their sum over: all chosen (all), all real experts "
            "(none), all experts (raw); backbone: all or none, as the base model",
        )

    config: Config

    def __init__(self, config: Config, spec: RoutingSpec) -> None:
        zeros = max(1, spec.num_experts // 2) if config.zeros is None else config.zeros
        super().__init__(config, spec, ["zero"] * zeros, config.k)
        self.weighted_zeros = config.zero_weight * zeros

    @torch.no_grad()
    def adopt_gate(self, gate_ED: Tensor) -> None:
        """The rows of zero experts are drawn from the real rows' mean and deviation."""
        super().adopt_gate(gate_ED)
        assert self.free_gate is not None
        gate_ED = gate_ED.float()
        std_D = gate_ED.std(0, correction=int(len(gate_ED) > 1))
        drawn_MD = torch.randn(self.free_gate.weight.shape, device=gate_ED.device)
        self.free_gate.weight.copy_(gate_ED.mean(0) + std_D * drawn_MD)

    def weigh(self, scores_TN: Tensor, mask_TN: Tensor) -> Tensor:
        how = self.config.norm_topk_prob
        if how == "raw":
            return scores_TN
        if how == "all" or divides_by_sum(how, self.spec):
            total_T1 = (scores_TN * mask_TN).sum(1, keepdim=True)
        else:
            total_T1 = self.split(scores_TN)[0].sum(1, keepdim=True)
        return scores_TN / total_T1.clamp_min(1e-20)

    def losses(
        self, decision: Decision, logits_TE: Tensor, ctx: TokenContext
    ) -> dict[str, LossTerm]:
        """(E + w M) / k * (f_E P_E / E + f_M P_M / (w M)): 1 at the share that is asked for.

        f are the choices a token makes in each group, P the score that the group has in the mean.
        """
        valid_T1 = ctx.is_valid_T[:, None]
        count = valid_T1.sum().clamp_min(1)
        sizes = (self.spec.num_experts, self.weighted_zeros)
        balance = logits_TE.new_zeros(())
        groups = zip(self.split(decision.mask_TE), self.split(decision.scores_TE), strict=True)
        for size, (mask_TG, scores_TG) in zip(sizes, groups, strict=True):
            balance = balance + mask_TG.sum() / count * (scores_TG * valid_T1).sum() / count / size
        balance = balance * (sum(sizes) / self.k)
        return {"group_balance": LossTerm(balance, self.config.balance_weight)}
