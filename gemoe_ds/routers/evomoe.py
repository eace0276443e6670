"""EvoMoE's router: what hypernetworks make of each token routes it, one network for each modality.

Jing et al. (arXiv 2505.23830, AAAI 2026); no public code. From the paper: two linear maps turn a
token into its own little SwiGLU (Eqs. 5 to 7), one pair for vision and one for text, a shared map
from its output to the experts (Eq. 8), top-1 of N = 4 evolved experts (routers/evolve.py makes
them), raw scores as weights, balance 0.001. Not in the paper: the widths; here the token is first
squeezed to `inner` features. Our reading, for frozen native backbones: the result is added to the
pretrained gate's logits, starts at zero, and k is the backbone's (`k: 1` is the paper's).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gemoe_ds.moe import losses
from gemoe_ds.moe.context import LossTerm, TokenContext
from gemoe_ds.moe.linear import RouterLinear
from gemoe_ds.moe.router import Decision, Router, RoutingSpec
from gemoe_ds.moe.selection import fixed_k, top_k_decision
from gemoe_ds.registry import ConfigModel


class EvoMoERouter(Router):
    """Static top-k on logits that depend on the token through its modality's hypernetwork."""

    name: ClassVar[str] = "evomoe"
    batch_losses: ClassVar[Mapping[str, str] | None] = {"load_balance": "balance_weight"}

    class Config(ConfigModel):
        k: int | None = Field(
            None, ge=1, description="experts a token; default: the backbone's own (paper: 1)"
        )
        inner: int = Field(64, ge=1, description="features that the token is squeezed to")
        rank: int = Field(4, ge=1, description="width of the SwiGLU that is made for a token")
        hidden: int = Field(16, ge=1, description="width between the two maps of a hypernetwork")
        gate: Literal["trained", "frozen", "none"] = Field(
            "trained",
            description="pretrained gate whose logits are added; none: hypernetwork alone",
        )
        balance_weight: float = Field(0.001, ge=0, description="coefficient of the load balance")
        norm_topk_prob: Literal["backbone", "none", "sum"] = Field(
            "backbone",
            description="sum: divide chosen scores by their sum; backbone: as the base model does",
        )

    config: Config

    def __init__(self, config: Config, spec: RoutingSpec) -> None:
        super().__init__(config, spec)
        self.static_k = self.top = fixed_k(config.k, spec)
        self.gate.requires_grad_(config.gate == "trained")
        self.squeeze = RouterLinear(spec.d_model, config.inner)
        self.of_vision = HyperNetwork(config.inner, config.hidden, config.rank)
        self.of_text = HyperNetwork(config.inner, config.hidden, config.rank)
        self.to_experts = RouterLinear(config.inner, spec.num_experts)
        if config.gate != "none":
            nn.init.zeros_(self.to_experts.weight)

    def score(self, x_TD: Tensor, ctx: TokenContext) -> Tensor:
        z_TI = self.squeeze(x_TD)
        # Both for all tokens: small, and no rank has to wait for a count.
        made_TI = torch.where(ctx.is_vision_T[:, None], self.of_vision(z_TI), self.of_text(z_TI))
        logits_TE: Tensor = self.to_experts(made_TI)
        return logits_TE if self.config.gate == "none" else logits_TE + self.gate(x_TD)

    def select(self, logits_TE: Tensor, x_TD: Tensor, ctx: TokenContext) -> Decision:
        return top_k_decision(logits_TE, self.top, self.config.norm_topk_prob, self.spec)

    def losses(
        self, decision: Decision, logits_TE: Tensor, ctx: TokenContext
    ) -> dict[str, LossTerm]:
        balance = losses.load_balance(decision.scores_TE, decision.mask_TE, ctx.is_valid_T)
        return {"load_balance": LossTerm(balance, self.config.balance_weight)}

    @property
    def depends_also_on(self) -> str:
        return "whether the token is one of an image"

    @property
    def max_k(self) -> int:
        return self.top


class HyperNetwork(nn.Module):
    """Theta = (w1 z + b1) w2 + b2, then Theta_up (SwiGLU (Theta_down z)), [T, I] -> [T, I]."""

    def __init__(self, inner: int, hidden: int, rank: int) -> None:
        super().__init__()
        self.rank, self.inner = rank, inner
        self.first = nn.Linear(inner, hidden)
        self.second = nn.Linear(hidden, 3 * rank * inner)

    def forward(self, z_TI: Tensor) -> Tensor:
        theta = self.second(self.first(z_TI.to(self.first.weight.dtype))).to(z_TI.dtype)
        theta_T3RI = theta.view(-1, 3 * self.rank, self.inner)
        gate_TRI, up_TRI, out_TRI = theta_T3RI.split(self.rank, dim=1)
        gate_TR = torch.einsum("tri,ti->tr", gate_TRI, z_TI)
        up_TR = torch.einsum("tri,ti->tr", up_TRI, z_TI)
        return torch.einsum("tri,tr->ti", out_TRI, nn.functional.silu(gate_TR) * up_TR)
