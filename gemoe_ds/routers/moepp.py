"""MoE++: zero, copy and constant experts among the FFNs, and routers that see the layer before.

Jin et al. (ICLR 2025); released code: inference only. From the paper: the three kinds
(moe/experts/zero_computation.py), the gating residual, the heterogeneous balance loss (Eq. 7), raw
softmax weights (Eq. 1). From the code, as a switch: zero experts get weight 0 and the rest is
divided by its sum. Left out, as for a pretrained backbone they would change it: the two-layer gate,
the input scaled by k, the capacity limits. Our reading: two experts of each kind as in GeMoE's
comparison, whose rows start at the mean of the pretrained ones, so that they are seldom chosen
until training says so (`free_rows: copies`: as often as others, at once); the gating residual
starts at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.context import LossTerm, TokenContext
from gemoe_ds.moe.experts.zero_computation import ZeroComputationKind
from gemoe_ds.moe.free_top_k import FreeTopK
from gemoe_ds.moe.linear import RouterLinear
from gemoe_ds.moe.router import Decision, RoutingSpec
from gemoe_ds.moe.selection import divides_by_sum
from gemoe_ds.registry import ConfigModel


class MoEPlusPlusRouter(FreeTopK):
    """Top-k over E routed and M free experts."""

    name: ClassVar[str] = "moepp"
    batch_losses: ClassVar[Mapping[str, str] | None] = {"load_balance": "balance_weight"}

    class Config(ConfigModel):
        zero: int = Field(2, ge=0, description="experts whose output is 0")
        copies: int = Field(2, ge=0, description="experts whose output is their input")
        constant: int = Field(2, ge=0, description="experts that mix the input with a vector")
        k: int | None = Field(
            None, ge=1, description="choices a token, free ones included; default: the backbone's k"
        )
        tau: float = Field(
            0.75,
            gt=0,
            description="weight of free experts in the balance; smaller: more tokens choose them",
        )
        balance_weight: float = Field(0.01, ge=0, description="beta of the balance loss")
        gating_residual: bool = Field(True, description="logits += W_g logits of the layer before")
        free_rows: Literal["mean", "copies"] = Field(
            "mean", description="initial gate rows of free experts: the mean row, or copies of rows"
        )
        norm_topk_prob: Literal["backbone", "none", "sum"] = Field(
            "backbone",
            description="none: raw scores (Eq. 1); sum: divide by the sum without zero experts; "
            "backbone: as the base model does",
        )

    config: Config

    def __init__(self, config: Config, spec: RoutingSpec) -> None:
        counts: dict[ZeroComputationKind, int] = {
            "zero": config.zero,
            "copy": config.copies,
            "constant": config.constant,
        }
        kinds = [kind for kind, count in counts.items() for _ in range(count)]
        if not kinds:
            raise ConfigError(
                "model.router: zero, copies and constant are all 0; use top_k instead"
            )
        super().__init__(config, spec, kinds, config.k)
        self.num_columns = spec.num_experts + len(kinds)
        self.residual: RouterLinear | None = None
        if config.gating_residual and spec.slot > 0:
            self.residual = RouterLinear(self.num_columns, self.num_columns)
            nn.init.zeros_(self.residual.weight)

    @torch.no_grad()
    def adopt_gate(self, gate_ED: Tensor) -> None:
        super().adopt_gate(gate_ED)
        assert self.free_gate is not None
        if self.config.free_rows == "copies":
            drawn = torch.randint(gate_ED.shape[0], self.free_gate.weight.shape[:1])
            self.free_gate.weight.copy_(gate_ED[drawn])
            return
        rows_MD = gate_ED.float().mean(0).expand_as(self.free_gate.weight)
        noise_MD = torch.randn_like(self.free_gate.weight) * 0.1 * gate_ED.float().std()
        self.free_gate.weight.copy_(rows_MD + noise_MD)

    def score(self, x_TD: Tensor, ctx: TokenContext) -> Tensor:
        logits_TN = super().score(x_TD, ctx)
        if self.residual is None:
            return logits_TN
        before_TN = ctx.layers[self.spec.slot - 1].logits_TE
        assert before_TN is not None, "the layer before has been routed"
        # layers may lie on several devices
        residual_TN: Tensor = self.residual(before_TN.to(logits_TN.device))
        return logits_TN + residual_TN

    def weigh(self, scores_TN: Tensor, mask_TN: Tensor) -> Tensor:
        if not divides_by_sum(self.config.norm_topk_prob, self.spec):
            return scores_TN
        is_zero_N = torch.zeros(self.num_columns, dtype=torch.bool, device=scores_TN.device)
        is_zero_N[self.spec.num_experts :][: self.config.zero] = True
        kept_TN = scores_TN * (mask_TN & ~is_zero_N)
        return kept_TN / kept_TN.sum(1, keepdim=True).clamp_min(1e-20)

    def losses(
        self, decision: Decision, logits_TE: Tensor, ctx: TokenContext
    ) -> dict[str, LossTerm]:
        """sum_i eta_i f_i P_i (Eq. 7), eta = 1 for FFNs and tau for free experts, f sums to k."""
        valid_T = ctx.is_valid_T
        count = valid_T.sum().clamp_min(1)
        eta_N = logits_TE.new_ones(self.num_columns)
        eta_N[self.spec.num_experts :] = self.config.tau
        share_N = decision.mask_TE.sum(0) / count
        mean_score_N = (decision.scores_TE * valid_T[:, None]).sum(0) / count
        balance = (eta_N * share_N.to(eta_N.dtype) * mean_score_N).sum()
        return {"load_balance": LossTerm(balance, self.config.balance_weight)}
