"""One layer to time: weights, tokens, and routers that give any mean k over the same gate.

Everything is random but not uniform: experts are loaded unevenly, as in trained models, and the
predictor is tilted until the mean k is the one asked for. Shapes: T tokens, D model, E experts,
F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.shapes import Shape
from gemoe_ds.moe.context import TokenContext
from gemoe_ds.moe.dispatch import Dispatcher, LocalDispatcher
from gemoe_ds.moe.experts.module import Experts
from gemoe_ds.moe.layer import MoELayer
from gemoe_ds.moe.router import Router, RoutingSpec
from gemoe_ds.routers.gemoe import GeMoERouter
from gemoe_ds.routers.top_k import TopKRouter

_LOAD_SPREAD = 0.3  # standard deviation of the experts' own logits: the busiest gets 2 to 3 shares
_K_SPREAD = 2.0  # of the predictor's logits: k differs from token to token


@dataclass(frozen=True)
class Weights:
    """One layer's: the gate in float32, the experts in the dtype of the products."""

    gate_ED: Tensor
    gate_up_EGD: Tensor
    down_EDF: Tensor


@dataclass(frozen=True)
class Problem:
    """The weights are the same on every rank, the tokens are not. x's first feature is constant."""

    shape: Shape
    weights: Weights
    x_TD: Tensor
    grad_TD: Tensor  # of the loss with respect to the output
    _experts: dict[tuple[bool, str], Experts] = field(default_factory=dict)

    @classmethod
    def make(
        cls, shape: Shape, num_tokens: int, dtype: torch.dtype, device: torch.device, rank: int = 0
    ) -> Problem:
        same, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank)
        d, f, e = shape.d_model, shape.width, shape.num_experts

        def normal(*size: int, std: float, generator: torch.Generator) -> Tensor:
            return torch.randn(*size, generator=generator).mul_(std)

        gate_ED = normal(e, d, std=d**-0.5, generator=same)
        gate_ED[:, 0] = normal(e, std=_LOAD_SPREAD, generator=same)
        gate_up_EGD = torch.empty(e, 2 * f, d, dtype=dtype, device=device)
        down_EDF = torch.empty(e, d, f, dtype=dtype, device=device)
        for expert in range(e):  # one by one: several ranks share the memory of a host
            gate_up_EGD[expert] = normal(2 * f, d, std=d**-0.5, generator=same)
            down_EDF[expert] = normal(d, f, std=f**-0.5, generator=same)
        weights = Weights(gate_ED.to(device), gate_up_EGD, down_EDF)
        x_TD = normal(num_tokens, d, std=1.0, generator=own)
        x_TD[:, 0] = 1.0
        grad_TD = normal(num_tokens, d, std=1.0, generator=own)
        return cls(shape, weights, x_TD.to(device, dtype), grad_TD.to(device, dtype))

    def experts(self, trainable: bool, local: slice) -> Experts:
        """The experts of this rank, `local` of all; one module however often it is asked for."""
        key = (trainable, str(local))
        if key not in self._experts:
            weights = self.weights.gate_up_EGD[local], self.weights.down_EDF[local]
            self._experts[key] = Experts(*weights, trainable=trainable)
        return self._experts[key]

    def router(self, mean_k: float) -> Router:
        """GeMoE's with this mean k; the static one for the smallest and the largest k."""
        shape = self.shape
        spec = RoutingSpec(shape.d_model, shape.num_experts, shape.top_k, norm_topk_prob=False)
        router: Router
        if mean_k in (1, shape.top_k):
            router = TopKRouter(TopKRouter.Config(k=int(mean_k)), spec)
        else:
            router = GeMoERouter(GeMoERouter.Config(), spec)
            self._tilt(router, mean_k)
        router.adopt_gate(self.weights.gate_ED)
        return router.to(self.x_TD.device)

    @torch.no_grad()
    def _tilt(self, router: GeMoERouter, mean_k: float) -> None:
        """Set the predictor so that the tokens of THIS problem have the mean k."""
        assert router.eap is not None
        weight_KD = router.eap.weight
        generator = torch.Generator().manual_seed(2)
        weight_KD.copy_(torch.randn(weight_KD.shape, generator=generator))
        weight_KD.mul_(_K_SPREAD * self.shape.d_model**-0.5)
        slope_K = torch.linspace(-1, 1, weight_KD.shape[0])
        low, high = -40.0, 40.0
        for _ in range(40):
            tilt = (low + high) / 2
            weight_KD[:, 0] = tilt * slope_K
            k_T = router.predict_k(self.x_TD.cpu()).round().clamp(router.k_low, router.k_high)
            low, high = (tilt, high) if k_T.mean() < mean_k else (low, tilt)


class Ours(nn.Module):
    """Our layer as the benchmark calls it: x_TD -> y_TD, losses beside."""

    def __init__(
        self,
        problem: Problem,
        mean_k: float,
        *,
        trainable: bool = False,
        dispatcher: Dispatcher | None = None,
        local: slice = slice(None),
        shared: nn.Module | None = None,
    ) -> None:
        """`local`: the experts that this rank holds."""
        super().__init__()
        self.ctx = TokenContext(1)
        experts = problem.experts(trainable, local)
        self.dispatcher = dispatcher or LocalDispatcher()
        router = problem.router(mean_k)
        self.layer = MoELayer(router, experts, self.dispatcher, self.ctx, shared)

    def forward(self, x_TD: Tensor) -> Tensor:
        valid_BS = torch.ones(1, x_TD.shape[0], dtype=torch.bool, device=x_TD.device)
        self.ctx.begin(valid_BS, torch.zeros_like(valid_BS))
        y_BSD: Tensor = self.layer(x_TD[None])
        return y_BSD[0]

    def losses(self) -> list[Tensor]:
        """The weighted auxiliary losses of the last forward pass."""
        return [term.weight * term.value for term in self.ctx.mean_losses().values()]

    @torch.no_grad()
    def routing(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(mask_TE, weights_TE): what the router decides."""
        valid_BS = torch.ones(1, x_TD.shape[0], dtype=torch.bool, device=x_TD.device)
        self.ctx.begin(valid_BS, torch.zeros_like(valid_BS))
        decision, _ = self.layer.router.decide(x_TD, self.ctx)
        return decision.mask_TE, decision.weights_TE
