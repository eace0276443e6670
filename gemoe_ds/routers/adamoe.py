"""AdaMoE: null experts that cost nothing stand among the true ones in a larger top-k.

Zeng et al. (Findings of EMNLP 2024). From the paper: the softmax over true and null experts, the
balance loss that averages over the nulls, its annealing, weights over the chosen true experts.
From the code: null rows start as copies of the gate's, M / E of each, so that k starts near
k E / (E + M). Against the code: its Mixtral version averages over the wrong dimension, which does
nothing; the formula of the paper is implemented. Our reading, for frozen native backbones: 4 nulls
and the backbone's k as in GeMoE's comparison, weights on the backbone's own scale
(`norm_topk_prob`), and an M that is no multiple of E: the rows left over are spread evenly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gemoe_ds.moe.context import LossTerm, TokenContext
from gemoe_ds.moe.free_top_k import FreeTopK
from gemoe_ds.moe.router import Decision, RoutingSpec
from gemoe_ds.moe.selection import divides_by_sum
from gemoe_ds.moe.step_context import StepContext
from gemoe_ds.registry import ConfigModel


class AdaMoERouter(FreeTopK):
    """Top-k over E true and M null experts: a token uses 0 to k true ones."""

    name: ClassVar[str] = "adamoe"
    batch_losses: ClassVar[Mapping[str, str] | None] = {
        "load_balance": "balance_weight balance_weight_end"
    }
    balance: Tensor  # the coefficient as it stands

    class Config(ConfigModel):
        nulls: int = Field(4, ge=1, description="null experts; k starts near k E / (E + nulls)")
        k: int | None = Field(
            None, ge=1, description="choices a token, nulls included; default: the backbone's k"
        )
        balance_weight: float = Field(0.02, ge=0, description="coefficient of the balance loss")
        balance_weight_end: float = Field(
            1e-4, ge=0, description="balance_weight in the second half of the run"
        )
        norm_topk_prob: Literal["backbone", "none", "sum", "all"] = Field(
            "backbone",
            description="divide scores by their sum over: the chosen true experts (sum; paper), "
            "all chosen (all), all true experts (none); backbone: sum or none, as the base model",
        )

    config: Config

    def __init__(self, config: Config, spec: RoutingSpec) -> None:
        super().__init__(config, spec, ["zero"] * config.nulls, config.k)
        self.register_buffer("balance", torch.tensor(config.balance_weight))

    @torch.no_grad()
    def adopt_gate(self, gate_ED: Tensor) -> None:
        """Null rows are copies of true ones, each of them copied equally often or once more."""
        super().adopt_gate(gate_ED)
        assert self.free_gate is not None
        copied_M = torch.arange(self.config.nulls) * gate_ED.shape[0] // self.config.nulls
        self.free_gate.weight.copy_(gate_ED[copied_M])

    def weigh(self, scores_TN: Tensor, mask_TN: Tensor) -> Tensor:
        how = self.config.norm_topk_prob
        if how == "all":
            return scores_TN / (scores_TN * mask_TN).sum(1, keepdim=True)
        true_TE, chosen_TE = self.split(scores_TN)[0], self.split(mask_TN)[0]
        counted_TE = true_TE * chosen_TE if divides_by_sum(how, self.spec) else true_TE
        total_T1 = counted_TE.sum(1, keepdim=True)
        return scores_TN / total_T1.clamp_min(1e-20)

    def losses(
        self, decision: Decision, logits_TE: Tensor, ctx: TokenContext
    ) -> dict[str, LossTerm]:
        """N sum_i f~_i P_i; f_i sums to k, and every null counts as their mean does."""
        valid_T = ctx.is_valid_T
        count = valid_T.sum().clamp_min(1)
        scores_TN = decision.scores_TE
        true_E, null_M = self.split((decision.mask_TE.sum(0) / count)[None])
        share_N = torch.cat([true_E, null_M.mean(1, keepdim=True).expand_as(null_M)], dim=1)[0]
        mean_score_N = (scores_TN * valid_T[:, None]).sum(0) / count
        balance = scores_TN.shape[1] * (share_N.to(mean_score_N.dtype) * mean_score_N).sum()
        return {"load_balance": LossTerm(self.balance * balance, 1.0)}

    def after_step(self, step_context: StepContext) -> None:
        if step_context.progress >= 0.5:
            self.balance.fill_(self.config.balance_weight_end)
