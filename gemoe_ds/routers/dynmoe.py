"""DynMoE: an expert is used where a token's similarity to it passes the expert's own threshold.

Guo et al. (ICLR 2025) and its released code. From both: cosine similarity, learned thresholds, the
straight-through sign, equal weights 1/k, the argmax where no expert passes at inference, the
diversity and simplicity losses, experts closed when idle and opened for the tokens that nobody
served. From the code, and not in the paper: the temperature, that gradients reach chosen experts
only, and two more losses, a load balance and the mean gate ("efficiency"). Its sum of the four,
times 0.01, is summed over layers; here it is their mean, as all losses are. Our reading, for frozen
native backbones (GeMoE's comparison says nothing): rows start at the pretrained gate; after the
first step all thresholds of a layer are set to the one that gives `start_k` (the paper's are all 0,
which takes half of all experts); `weights: scores` keeps the backbone's scale; nothing closes or
opens unless `adapt` asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.context import LossTerm, TokenContext
from gemoe_ds.moe.host_copy import Remembered
from gemoe_ds.moe.linear import RouterLinear
from gemoe_ds.moe.router import Decision, Router, RoutingSpec
from gemoe_ds.moe.step_context import StepContext
from gemoe_ds.registry import ConfigModel


@dataclass(frozen=True)
class DynMoEDecision(Decision):
    """With 1 for every expert, [T, E], whose gradient is that of the margin above its threshold."""

    passed_TE: Tensor


class DynMoERouter(Router):
    """Top-any: expert e where sigmoid(t cos(x, w_e)) > sigmoid(t G_e)."""

    name: ClassVar[str] = "dynmoe"
    batch_losses: ClassVar[Mapping[str, str] | None] = {"load_balance": "balance_weight"}
    added: ClassVar[Mapping[str, Any]] = {"balance_weight": 0.0, "efficiency_weight": 0.0}
    is_open_E: Tensor
    is_calibrated: Tensor
    chosen_E: Tensor
    unserved_D: Tensor
    gate: CosineGate

    class Config(ConfigModel):
        start_k: float | Literal["half"] | None = Field(
            None, description="mean k after the first step; half: G = 0 (paper); null: backbone's k"
        )
        temperature: float = Field(10.0, gt=0, description="t (code: 1 or 10, by version)")
        weights: Literal["equal", "scores"] = Field(
            "equal", description="equal: 1/k (paper); scores: softmax of the gate's logits"
        )
        diversity_weight: float = Field(
            0.01, ge=0, description="coefficient of |W^T W - I|, unit rows"
        )
        simplicity_weight: float = Field(0.01, ge=0, description="coefficient of the mean row norm")
        balance_weight: float = Field(
            0.01, ge=0, description="coefficient of the load balance (code; paper: 0)"
        )
        efficiency_weight: float = Field(
            0.01, ge=0, description="coefficient of mean k / experts (code; paper: 0)"
        )
        adapt: Literal["no", "close", "both"] = Field(
            "no",
            description="close: close idle experts; both: also open one for tokens that have none",
        )
        adapt_every: int = Field(300, ge=1, description="steps between two changes by `adapt`")

    config: Config

    def __init__(self, config: Config, spec: RoutingSpec) -> None:
        super().__init__(config, spec)
        self.gate = CosineGate(spec.d_model, spec.num_experts)
        self.threshold = Threshold(spec.num_experts)
        self.start_k = spec.top_k if config.start_k is None else config.start_k
        if self.start_k != "half" and not 0 < self.start_k <= spec.num_experts:
            raise ConfigError(
                f"model.router.start_k={self.start_k:g} must be above 0 and at most the backbone's "
                f"{spec.num_experts} experts"
            )
        self.register_buffer("is_open_E", torch.ones(spec.num_experts))
        self.register_buffer("is_calibrated", torch.tensor(float(self.start_k == "half")))
        self._is_calibrated = Remembered()
        self.register_buffer("chosen_E", torch.zeros(spec.num_experts))  # since the last change
        self.register_buffer("unserved_D", torch.zeros(spec.d_model))

    def score(self, x_TD: Tensor, ctx: TokenContext) -> Tensor:
        """The gate's plain logits, for weights and entropy; similarities are kept beside them."""
        logits_TE, cos_TE, diversity, simplicity = self.gate(x_TD, self.is_open_E)
        cache = self.record_of(ctx).cache
        cache["cos_TE"], cache["diversity"], cache["simplicity"] = cos_TE, diversity, simplicity
        plain_TE: Tensor = logits_TE
        return plain_TE

    def select(self, logits_TE: Tensor, x_TD: Tensor, ctx: TokenContext) -> DynMoEDecision:
        t, is_open_E = self.config.temperature, self.is_open_E > 0
        cache = self.record_of(ctx).cache
        cos_TE = cache["cos_TE"]
        margin_TE = (t * cos_TE).sigmoid() - (t * self.threshold(cos_TE)).sigmoid()
        mask_TE = (margin_TE > 0) & is_open_E
        # sign(relu(margin)), whose derivative is taken to be that of relu
        passed_TE = 1 + margin_TE - margin_TE.detach()
        if self.training:
            unserved_T = ~mask_TE.any(1) & ctx.is_valid_T
            cache["unserved_D"] = (x_TD * unserved_T[:, None]).float().sum(0).detach()
        else:
            best_T1 = cos_TE.masked_fill(~is_open_E, -2.0).argmax(1, keepdim=True)
            mask_TE = mask_TE.scatter(
                1, best_T1, mask_TE.gather(1, best_T1) | ~mask_TE.any(1, True)
            )
        scores_TE = logits_TE.softmax(-1)
        if self.config.weights == "scores":
            weights_TE = scores_TE * passed_TE
        else:
            weights_TE = passed_TE / mask_TE.sum(1, keepdim=True).clamp_min(1)
        return DynMoEDecision(scores_TE, mask_TE, weights_TE, passed_TE)

    def losses(
        self, decision: Decision, logits_TE: Tensor, ctx: TokenContext
    ) -> dict[str, LossTerm]:
        assert isinstance(decision, DynMoEDecision)
        cache = self.record_of(ctx).cache
        gates_TE = decision.passed_TE * decision.mask_TE
        balance, efficiency = balance_and_efficiency(gates_TE, decision.mask_TE, ctx.is_valid_T)
        return {
            "diversity": LossTerm(
                cache["diversity"], self.config.diversity_weight, over_tokens=True
            ),
            "simplicity": LossTerm(
                cache["simplicity"], self.config.simplicity_weight, over_tokens=True
            ),
            "load_balance": LossTerm(balance, self.config.balance_weight),
            "efficiency": LossTerm(efficiency, self.config.efficiency_weight, over_tokens=True),
        }

    def step_counts(self, decision: Decision, ctx: TokenContext) -> dict[str, Tensor]:
        cache = self.record_of(ctx).cache
        counts = {"tokens": ctx.is_valid_T.sum(), "chosen_E": decision.mask_TE.sum(0)}
        if self.config.adapt == "both":
            counts["unserved_D"] = cache["unserved_D"]
        if not self._is_calibrated.of(self.is_calibrated):
            counts["quantile"] = self._quantile(cache["cos_TE"], ctx.is_valid_T) * counts["tokens"]
        return counts

    def _quantile(self, cos_TE: Tensor, valid_T: Tensor) -> Tensor:
        """The cosine that `start_k` experts of a valid token pass on average; 0 without tokens."""
        assert not isinstance(self.start_k, str)
        if not cos_TE.numel():
            return cos_TE.new_zeros(())
        cos_A = cos_TE.masked_fill(~valid_T[:, None], torch.inf).flatten().sort().values
        last = valid_T.sum() * self.spec.num_experts - 1
        at = ((1 - self.start_k / self.spec.num_experts) * last.double()).long().clamp_min(0)
        return torch.where(last < 0, 0.0, cos_A.gather(0, at[None])[0])

    def after_step(self, step_context: StepContext) -> None:
        layer = step_context.layer
        if not self._is_calibrated.of(self.is_calibrated) and layer["tokens"] > 0:
            start = layer["quantile"] / layer["tokens"]
            step_context.assign_(self.threshold.value_E, start.expand(self.spec.num_experts))
            self.is_calibrated.fill_(1.0)
        if self.config.adapt == "no":
            return
        self.chosen_E += layer["chosen_E"].float()
        if self.config.adapt == "both":
            self.unserved_D += layer["unserved_D"].float()
        if step_context.step % self.config.adapt_every == 0:
            self._adapt(step_context)

    @property
    def peak_mean_k(self) -> float:
        half = self.spec.num_experts / 2  # of the first step, at G = 0
        return half if isinstance(self.start_k, str) else max(half, self.start_k)

    def _adapt(self, step_context: StepContext) -> None:
        """Close what nobody chose; open the first closed one for what nobody served."""
        before_E = self.is_open_E.clone()
        self.is_open_E *= self.chosen_E > 0
        closed = (self.is_open_E == 0).nonzero().flatten().tolist()
        if self.config.adapt == "both" and closed and self.unserved_D.any():
            expert = closed[0]
            rows_ED = step_context.read_param(self.gate.weight).clone()
            rows_ED[expert] = nn.functional.normalize(self.unserved_D, dim=0)
            step_context.assign_(self.gate.weight, rows_ED)
            value_E = step_context.read_param(self.threshold.value_E).clone()
            value_E[expert] = 0.0
            step_context.assign_(self.threshold.value_E, value_E)
            self.is_open_E[expert] = 1.0
        if not self.is_open_E.any():  # nothing was chosen at all: that says nothing of any expert
            self.is_open_E.copy_(before_E)
        self.chosen_E.zero_()
        self.unserved_D.zero_()


def balance_and_efficiency(
    gates_TE: Tensor, mask_TE: Tensor, valid_T: Tensor
) -> tuple[Tensor, Tensor]:
    """E sum_e m_e c_e over the tokens that have an expert, and the mean gate over all tokens.

    m_e is the mean of the gates, divided by their sum per token; c_e the share of tokens that chose
    e, without gradient. Gates are 0 where the mask is false, and for padding.
    """
    num_experts = gates_TE.shape[1]
    served = mask_TE.any(1).sum().clamp_min(1)
    mean_E = (gates_TE / gates_TE.sum(1, keepdim=True).clamp_min(1)).sum(0) / served
    share_E = mask_TE.sum(0) / served
    efficiency = gates_TE.sum() / (valid_T.sum().clamp_min(1) * num_experts)
    return num_experts * (mean_E * share_E.to(mean_E.dtype)).sum(), efficiency


class CosineGate(RouterLinear):
    """Logits x W^T, cosines of the same, and the two measures of W that the losses want."""

    def forward(self, x_TD: Tensor, is_open_E: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        logits_TE = super().forward(x_TD)
        length_E = self.weight.norm(dim=1)
        length_T = x_TD.to(logits_TE.dtype).norm(dim=1, keepdim=True)
        cos_TE = logits_TE / (length_T * length_E).clamp_min(1e-12)
        unit_ED = self.weight / length_E[:, None].clamp_min(1e-12) * is_open_E[:, None]
        diversity = (unit_ED @ unit_ED.t() - torch.diag(is_open_E)).norm()
        return logits_TE, cos_TE, diversity, length_E.mean()


class Threshold(nn.Module):
    """G_e: the similarity from which on expert e is used, one for every token, [1, E]."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.value_E = nn.Parameter(torch.zeros(num_experts))

    def forward(self, cos_TE: Tensor) -> Tensor:
        return self.value_E.expand(1, -1)
