"""Routed experts: stacked SwiGLU FFNs applied to a ragged plan.

Shapes: N rows, A assignments, E experts held here, D model, F expert width, G = 2 F (gate and up).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemoe_ds.moe.experts.ffn import ragged_ffn
from gemoe_ds.moe.experts.grouped_gemm import TORCH, GroupedGemm
from gemoe_ds.moe.experts.quantised import QuantisedWeight
from gemoe_ds.moe.experts.weights import (
    ExpertWeights,
    PackedExpertWeights,
    QuantisedExpertWeights,
)
from gemoe_ds.moe.plan import RoutingPlan


class Experts(nn.Module):
    """E SwiGLU experts: y = W_down (silu(W_gate x) * W_up x).

    Frozen experts are non-persistent buffers: no optimizer, no checkpoint and no ZeRO stage ever
    sees them, so each rank can hold its own shard. They cost no weight gradient. Trainable experts
    are ordinary parameters.
    """

    gate_up_EGD: Tensor
    down_EDF: Tensor
    gemm: GroupedGemm = TORCH  # replaced where another one is faster: engine/gemm.py

    def __init__(
        self, gate_up_EGD: Tensor, down_EDF: Tensor, *, trainable: bool, pack: bool = True
    ) -> None:
        """`pack`: on a CPU, hold frozen weights in its own layout as well; see weights.py."""
        super().__init__()
        num_experts, gate_up_width, d_model = gate_up_EGD.shape
        assert down_EDF.shape == (num_experts, d_model, gate_up_width // 2)
        for name, tensor in (("gate_up_EGD", gate_up_EGD), ("down_EDF", down_EDF)):
            if trainable:
                setattr(self, name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor.detach(), persistent=False)
        self.pack = pack and not trainable
        self._packed: PackedExpertWeights | None = None

    @property
    def num_experts(self) -> int:
        return self.down_EDF.shape[0]

    @property
    def gate_up_tensors(self) -> tuple[Tensor, ...]:
        """All that holds the gate and up projections, [E, G, ..]."""
        return (self.gate_up_EGD,)

    def forward(self, x_ND: Tensor, plan: RoutingPlan) -> Tensor:
        """y_ND = sum over a row's assignments of weight * expert(x), in the dtype of `x_ND`.

        Sums run in float32 at least; a row without assignments gives 0; A = 0, N = 0 and idle
        experts are ordinary. Under autocast the products run in its dtype; those of bfloat16 in
        float32, where a CPU has no instructions for it.
        """
        device = x_ND.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        else:
            dtype = self._dtype_without_autocast(x_ND)
        return ragged_ffn(x_ND, plan, self._expert_weights(dtype))

    def _dtype_without_autocast(self, x_ND: Tensor) -> torch.dtype:
        return torch.promote_types(x_ND.dtype, self.gate_up_EGD.dtype)

    def _expert_weights(self, dtype: torch.dtype) -> ExpertWeights:
        weights = self.gate_up_EGD, self.down_EDF
        if not (self.pack and PackedExpertWeights.can_pack(self.gate_up_EGD, dtype)):
            return ExpertWeights(*weights, dtype, self.gemm)
        packed = self._packed
        if packed is None or packed.gate_up_EGD is not weights[0]:  # moved, or given another dtype
            packed = self._packed = PackedExpertWeights(*weights)
        return packed


class QuantisedExperts(Experts):
    """The same with frozen weights in 8 or 4 bits."""

    def __init__(self, gate_up: QuantisedWeight, down: QuantisedWeight) -> None:
        nn.Module.__init__(self)
        self.gate_up, self.down, self.pack = gate_up, down, False

    @property
    def gate_up_EGD(self) -> QuantisedWeight:  # type: ignore[override]
        return self.gate_up

    @property
    def down_EDF(self) -> QuantisedWeight:  # type: ignore[override]
        return self.down

    @property
    def gate_up_tensors(self) -> tuple[Tensor, ...]:
        return self.gate_up.codes_EMC, self.gate_up.scales_EMB

    def _dtype_without_autocast(self, x_ND: Tensor) -> torch.dtype:
        return x_ND.dtype

    def _expert_weights(self, dtype: torch.dtype) -> ExpertWeights:
        return QuantisedExpertWeights(self.gate_up, self.down, dtype)
