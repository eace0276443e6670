"""Router: score -> select -> losses, in that order; a routing method fills in the steps.

Words: *logits* are raw, *scores* come after the softmax, *mask* says which experts were chosen,
*weights* combine their outputs. Shapes: T tokens, D model, E experts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gemoe_ds.moe import losses
from gemoe_ds.moe.context import LossTerm, Stat, TokenContext
from gemoe_ds.moe.linear import RouterLinear
from gemoe_ds.moe.plan import RoutingPlan
from gemoe_ds.registry import ConfigModel, Registered

Assign = Callable[[nn.Parameter, Tensor], None]


@dataclass(frozen=True)
class RoutingSpec:
    """What a backbone says about the routing of one of its MoE layers."""

    d_model: int
    num_experts: int
    top_k: int  # the backbone's own k
    renormalise: bool  # divide the chosen scores by their sum (norm_topk_prob)


@dataclass(frozen=True)
class Decision:
    """The outcome of `select`. Routers subclass it to hand more to their own `losses`."""

    scores_TE: Tensor  # float32
    mask_TE: Tensor  # bool
    weights_TE: Tensor  # float32; read only where the mask is true


class Router(Registered, nn.Module):
    """Base of the routing methods: subclasses override the steps, nobody `decide` or `record`."""

    def __init__(self, config: ConfigModel, spec: RoutingSpec) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        self.gate = RouterLinear(spec.d_model, spec.num_experts)

    def score(self, x_TD: Tensor, ctx: TokenContext) -> Tensor:
        """logits_TE in float32 (float64 for float64 input)."""
        logits_TE: Tensor = self.gate(x_TD)
        return logits_TE

    @abstractmethod
    def select(self, logits_TE: Tensor, x_TD: Tensor, ctx: TokenContext) -> Decision:
        """Choose experts and weights for every token."""

    def losses(
        self, decision: Decision, logits_TE: Tensor, ctx: TokenContext
    ) -> dict[str, LossTerm]:
        """The auxiliary losses of this layer by name; padding must not enter them."""
        return {}

    def after_step(self, step: int, assign_: Assign) -> None:
        """Upkeep after an optimizer step; `assign_(parameter, value)` survives ZeRO."""

    @torch.no_grad()
    def adopt_gate(self, gate_ED: Tensor) -> None:
        """Start from the backbone's own pretrained gate."""
        self.gate.weight.copy_(gate_ED)

    def decide(self, x_TD: Tensor, ctx: TokenContext) -> tuple[Decision, Tensor]:
        """Route T tokens: the decision, with k = 0 for padding, and logits_TE."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.score(x_TD, ctx)
            decision = self.select(logits_TE, x_TD, ctx)
            mask_TE = decision.mask_TE & ctx.is_valid_T[:, None]
            return replace(decision, mask_TE=mask_TE), logits_TE

    def record(self, decision: Decision, logits_TE: Tensor, ctx: TokenContext, slot: int) -> None:
        """Losses and statistics of a decision into `ctx.layers[slot]`."""
        with torch.autocast(logits_TE.device.type, enabled=False):
            record = ctx.layers[slot]
            record.logits_TE = logits_TE
            if torch.is_grad_enabled():
                record.losses = self.losses(decision, logits_TE, ctx)
            if ctx.collect or ctx.trace:
                with torch.no_grad():
                    entropy_T = losses.entropy_bits(decision.scores_TE)
                    k_T = decision.mask_TE.sum(1)
                    if ctx.trace:
                        record.entropy_T, record.k_T = entropy_T, k_T
                    if ctx.collect:
                        record.stats = routing_stats(
                            decision.mask_TE, entropy_T, k_T, self.max_k, ctx
                        )

    def forward(self, x_TD: Tensor, ctx: TokenContext, slot: int) -> RoutingPlan:
        """Both, and the plan: a router on its own."""
        decision, logits_TE = self.decide(x_TD, ctx)
        self.record(decision, logits_TE, ctx, slot)
        return RoutingPlan.from_mask(decision.mask_TE, decision.weights_TE)

    @property
    def max_k(self) -> int:
        """The largest k that `select` may give; the width of the k histogram."""
        return self.spec.num_experts


def routing_stats(
    mask_TE: Tensor, entropy_T: Tensor, k_T: Tensor, max_k: int, ctx: TokenContext
) -> dict[str, Stat]:
    """What TensorBoard shows of one layer: k, entropy, their rank correlation, load per expert."""
    valid_T, vision_T = ctx.is_valid_T, ctx.is_vision_T
    num_valid = valid_T.sum()
    stats = {
        "mean_k": Stat(k_T.sum().float(), count=num_valid),
        "entropy_bits": Stat((entropy_T * valid_T).sum(), count=num_valid),
        "tokens_per_expert": Stat(mask_TE.sum(0).float(), "sum"),
    }
    for kind, of_kind_T in (("image", vision_T), ("text", ~vision_T)):
        chosen_T = of_kind_T & valid_T
        histogram = torch.bincount(k_T[chosen_T], minlength=max_k + 1).float()
        stats[f"k_histogram_{kind}"] = Stat(histogram, "sum")
        stats[f"mean_k_{kind}"] = Stat((k_T * chosen_T).sum().float(), count=chosen_T.sum())
    rho = losses.spearman(entropy_T[valid_T], k_T[valid_T])
    # Undefined where k is constant; a count of 0 keeps the set of statistics equal on all ranks.
    stats["spearman"] = (
        Stat(rho * num_valid, count=num_valid)
        if rho is not None
        else Stat(num_valid * 0.0, count=0.0)
    )
    return stats
