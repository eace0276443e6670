"""EvoMoE's stage II: one expert trains, the others follow it part of the way.

Jing et al. (arXiv 2505.23830), Eq. 1, whose print is ambiguous. Implemented is the reading that
agrees with the paper's own remarks (beta = 0 copies the trained expert; 0.9 keeps 10 % of every
update): theta_n += (1 - beta) * (the update of theta_1), beta drawn anew every step from a range of
its own for each expert. So every expert ends between where they all started and theta_1.

Every token goes to expert 0, as if the model were dense: use it on an upcycled backbone with
`model.trainable: experts`, then train a router on the exported result. Over ranks that share
experts the one with expert 0 has all the work, so that EP size 1 is the faster one where memory
allows it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.context import TokenContext
from gemoe_ds.moe.experts.module import Experts
from gemoe_ds.moe.router import Decision, Router, RoutingSpec
from gemoe_ds.moe.step_context import Read, StepContext
from gemoe_ds.registry import ConfigModel


class EvolveRouter(Router):
    """Expert 0 for every token, with weight 1; after every step the others evolve."""

    name: ClassVar[str] = "evolve"
    weighs_all = False
    trains_experts = True
    static_k = 1

    class Config(ConfigModel):
        beta: tuple[tuple[float, float], ...] = Field(
            ((0.9, 0.99), (0.8, 0.89), (0.7, 0.79)),
            description="range of beta for expert 1, 2, ...; repeated for further experts",
        )

    config: Config

    def __init__(self, config: Config, spec: RoutingSpec) -> None:
        super().__init__(config, spec)
        self.gate.requires_grad_(False)
        for low, high in config.beta:
            if not 0 <= low <= high <= 1:
                raise ConfigError(
                    f"model.router.beta: [{low:g}, {high:g}] is not a range within 0 to 1"
                )
        self._before: dict[str, Tensor] = {}

    def select(self, logits_TE: Tensor, x_TD: Tensor, ctx: TokenContext) -> Decision:
        mask_TE = torch.zeros_like(logits_TE, dtype=torch.bool)
        mask_TE[:, 0] = True
        return Decision(logits_TE.softmax(-1), mask_TE, torch.ones_like(logits_TE))

    def before_steps(self, experts: Experts, read_param: Read, broadcast_from_first: Read) -> None:
        if not any(p.requires_grad for p in experts.parameters()):
            raise ConfigError(
                "router 'evolve' trains an expert: set model.trainable=experts in a recipe, or "
                "give trainable='experts' to convert()"
            )
        for name, parameter in experts.named_parameters():
            self._before[name] = broadcast_from_first(read_param(parameter)[0]).clone()

    def after_step(self, step_context: StepContext) -> None:
        for name, parameter in step_context.experts.named_parameters():
            value_E = step_context.read_param(parameter).clone()
            trained = step_context.broadcast_from_first(value_E[0]).clone()
            update = trained - self._before[name]
            for row, expert in enumerate(step_context.expert_ids):
                if expert > 0:
                    value_E[row] += (1 - self.beta(step_context.step, expert)) * update
            self._before[name] = trained
            step_context.assign_(parameter, value_E)

    def beta(self, step: int, expert: int) -> float:
        """Uniform in the expert's range; follows from its arguments, so that all ranks agree."""
        low, high = self.config.beta[(expert - 1) % len(self.config.beta)]
        seed = (step * 1000 + self.spec.slot) * 1000 + expert
        drawn = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return low + (high - low) * drawn.item()

    @property
    def max_k(self) -> int:
        return 1
