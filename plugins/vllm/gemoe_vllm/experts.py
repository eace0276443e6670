"""vLLM's experts for the slots that need more than other ids: `ragged` and `padding`.

Shapes: T tokens, D model, K slots, A slots in use, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.platforms import current_platform

from gemoe_vllm._gemoe.errors import ConfigError
from gemoe_vllm.options import PADDING, RAGGED
from gemoe_vllm.padding import padded_map
from gemoe_vllm.routing import Routing


class RaggedExperts(RoutedExperts):
    """Each slot in use as a row of its own with one expert; rows are summed in float32."""

    def __init__(self, *args: Any, routing: Routing, **kwargs: Any) -> None:
        if not current_platform.is_cpu():
            raise ConfigError(
                "--additional-config: gemoe.slots=ragged is for CPUs: it waits for the number of "
                "rows; leave it out (fold)"
            )
        super().__init__(*args, **kwargs)
        self.routing = routing

    def forward_modular(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        rows, slots = (topk_ids >= 0).nonzero(as_tuple=True)
        one = topk_weights[rows, slots][:, None], topk_ids[rows, slots][:, None]
        if not len(rows):
            return torch.zeros_like(x)
        y_AD = super().forward_modular(x.index_select(0, rows), *one, *args, **kwargs)
        return _summed(y_AD, rows, x)

    def forward_monolithic(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Routed here, as the kernel takes as many rows as it is given tokens."""
        weights_TK, ids_TK = self.routing(x)
        rows, slots = (ids_TK >= 0).nonzero(as_tuple=True)
        if not len(rows):
            return torch.zeros_like(x)
        self.routing.given = weights_TK[rows, slots][:, None], ids_TK[rows, slots][:, None]
        try:
            y_AD = super().forward_monolithic(x.index_select(0, rows), *args, **kwargs)
        finally:
            self.routing.given = None
        return _summed(y_AD, rows, x)


def _summed(y_AD: Tensor, rows_A: Tensor, x_TD: Tensor) -> Tensor:
    total_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
    return total_TD.index_add_(0, rows_A, y_AD.float()).to(x_TD.dtype)


class PaddedExperts(RoutedExperts):
    """An expert E beside the others that no rank has: kernels skip its rows. NOT RUN ON A GPU.

    As with expert parallelism, where most experts are elsewhere: `expert_map` gives -1 for it.
    """

    def __init__(self, *args: Any, routing: Routing, **kwargs: Any) -> None:
        if not current_platform.is_cuda():
            raise ConfigError(
                f"--additional-config: gemoe.slots={PADDING} is for CUDA; leave it out (fold)"
            )
        super().__init__(*args, **kwargs)
        self._padded: Tensor | None = None

    def forward_modular(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        experts, own_map = self.global_num_experts, self._expert_map
        if self._padded is None:
            self._padded = padded_map(own_map, experts, x.device)
        self.global_num_experts, self._expert_map = experts + 1, self._padded
        try:
            return super().forward_modular(x, *args, **kwargs)
        finally:
            self.global_num_experts, self._expert_map = experts, own_map


EXPERTS = {RAGGED: RaggedExperts, PADDING: PaddedExperts}
