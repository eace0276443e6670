"""ReMoE: ReLU instead of top-k; an L1 loss whose coefficient is steered keeps k down.

Wang et al. (ICLR 2025) and its Megatron code. From both: R = ReLU(.), output sum R_e E_e(x), the
regulariser that balances the load (Eq. 10) and its controller (Eqs. 8, 9: times or divided by
1.2 after every step). Our reading, for pretrained softmax gates whose logits have no zero: R =
gain * ReLU(p - theta) with a learned theta and gain a layer (`activation: scores`), theta from
1/E, where an expert is as likely as any; a larger first coefficient, as few steps follow; and
bounds on it, which the paper has not: it would become 0, or infinite, and stay so.

What the controller can do: L1 takes experts away and brings none back. Mean k is held down to the
target; from below only cross-entropy raises it, undisturbed as the coefficient falls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.context import LossTerm, TokenContext
from gemoe_ds.moe.router import Decision, Router, RoutingSpec
from gemoe_ds.moe.step_context import StepContext
from gemoe_ds.registry import ConfigModel


@dataclass(frozen=True)
class ReMoEDecision(Decision):
    """With the ReLUs before they are scaled, [T, E]: what is regularised."""

    relu_TE: Tensor


class ReMoERouter(Router):
    """An expert is used where its ReLU is above 0: k from 0 to E, every gradient exact."""

    name: ClassVar[str] = "remoe"
    batch_losses: ClassVar[Mapping[str, str] | None] = {"sparsity": ""}
    weighs_all = False
    coefficient: Tensor  # lambda of Eq. 8 as it stands

    class Config(ConfigModel):
        target_k: float | None = Field(
            None, gt=0, description="mean k above which lambda rises; default: the backbone's k"
        )
        activation: Literal["scores", "logits"] = Field(
            "scores", description="input of the ReLU (paper, trained from scratch: logits)"
        )
        coefficient: float = Field(
            1e-6, gt=0, description="initial lambda, the coefficient of the L1 loss (paper: 1e-8)"
        )
        factor: float = Field(
            1.2, gt=1, description="factor by which lambda changes each step (alpha)"
        )
        coefficient_range: tuple[float, float] = Field(
            (1e-10, 100.0), description="bounds of lambda (paper: none)"
        )

    config: Config

    def __init__(self, config: Config, spec: RoutingSpec) -> None:
        super().__init__(config, spec)
        self.target_k = spec.top_k if config.target_k is None else config.target_k
        if self.target_k >= spec.num_experts:
            raise ConfigError(
                f"model.router.target_k={self.target_k} must be below the backbone's "
                f"{spec.num_experts} experts"
            )
        low, high = config.coefficient_range
        if not 0 < low <= config.coefficient <= high < float("inf"):
            raise ConfigError(
                f"model.router: coefficient={config.coefficient:g} must be within "
                f"coefficient_range=[{low:g}, {high:g}], which is finite and above 0"
            )
        self.shift = Shift(1 / spec.num_experts) if config.activation == "scores" else None
        self.register_buffer("coefficient", torch.tensor(config.coefficient))

    def select(self, logits_TE: Tensor, x_TD: Tensor, ctx: TokenContext) -> Decision:
        scores_TE = logits_TE.softmax(-1)  # for its entropy, and for the ReLU of `scores`
        if self.shift is None:
            relu_TE = weights_TE = logits_TE.relu()
        else:
            relu_TE, weights_TE = self.shift(scores_TE)
        return ReMoEDecision(scores_TE, relu_TE > 0, weights_TE, relu_TE)

    def losses(
        self, decision: Decision, logits_TE: Tensor, ctx: TokenContext
    ) -> dict[str, LossTerm]:
        """(1/T) sum_te f_e R_te with f_e = E / (k T) * tokens of e, k the target (Eq. 10)."""
        assert isinstance(decision, ReMoEDecision)
        valid_T = ctx.is_valid_T
        count = valid_T.sum().clamp_min(1)
        mask_TE, relu_TE = decision.mask_TE, decision.relu_TE
        share_E = mask_TE.sum(0) * (self.spec.num_experts / (self.target_k * count))
        mean_E = (relu_TE * mask_TE).sum(0) / count
        sparsity = (share_E.to(mean_E.dtype) * mean_E).sum()
        return {"sparsity": LossTerm(self.coefficient * sparsity, 1.0)}

    def step_counts(self, decision: Decision, ctx: TokenContext) -> dict[str, Tensor]:
        return {"active": decision.mask_TE.sum(), "tokens": ctx.is_valid_T.sum()}

    def after_step(self, step_context: StepContext) -> None:
        """lambda goes up where more are active than should be, in the mean over all layers."""
        mean_k = step_context.model["active"] / step_context.model["tokens"].clamp_min(1)
        factor = self.config.factor if mean_k > self.target_k else 1 / self.config.factor
        self.coefficient.mul_(factor).clamp_(*self.config.coefficient_range)

    @property
    def peak_mean_k(self) -> float:
        """Half of the logits are above 0, and at most so many scores above their mean."""
        return max(self.target_k, self.spec.num_experts / 2)


class Shift(nn.Module):
    """ReLU(p - theta), and that times gain, both [T, E]; theta and gain are learned, and positive.

    The regulariser sees what comes before the gain: else it would be met by a small gain, with as
    many experts as before and none of them heard.
    """

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.log_theta = nn.Parameter(torch.tensor([theta]).log())
        self.log_gain = nn.Parameter(torch.zeros(1))

    def forward(self, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
        relu_TE = (scores_TE - self.log_theta.exp()).relu()
        return relu_TE, relu_TE * self.log_gain.exp()
