"""AdamW for ZeRO 0, where DeepSpeed wraps nothing: the global norm, clipping, and skipped steps."""

from __future__ import annotations

from typing import Any

import deepspeed.comm as dist
import torch
from torch import Tensor, nn


class GlobalNormAdamW(torch.optim.AdamW):
    """Clips by the norm over ALL ranks' parameters, and refuses a step that is not finite.

    The ZeRO wrappers of stages 1 to 3 do both. Without one, DeepSpeed averages the ranks' own
    norms (wrong by sqrt(EP size) when experts are sharded, its issue 8475) and lets Adam swallow
    a NaN. Gradients must have been reduced. `overflow` and `_global_grad_norm` are what the engine
    reads from its own wrappers after a step.
    """

    def __init__(self, groups: list[dict[str, Any]], *, max_grad_norm: float | None, **kwargs: Any):
        super().__init__(groups, **kwargs)
        self.max_grad_norm = max_grad_norm
        self.expert_group: Any = None  # process group over which expert parameters are sharded
        self.overflow = False
        self._global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        squares = self._square_sum([p for p in params if getattr(p, "allreduce", True)])
        if self.expert_group is not None:
            sharded = self._square_sum([p for p in params if not getattr(p, "allreduce", True)])
            dist.all_reduce(sharded, group=self.expert_group)
            squares = squares + sharded
        self._global_grad_norm = float(squares.sqrt())
        self.overflow = not torch.isfinite(squares).item()
        if self.overflow:
            return
        if self.max_grad_norm is not None and self._global_grad_norm > self.max_grad_norm:
            scale = self.max_grad_norm / (self._global_grad_norm + 1e-6)
            torch._foreach_mul_([p.grad for p in params], scale)
        super().step()

    def _square_sum(self, params: list[nn.Parameter]) -> Tensor:
        device = self.param_groups[0]["params"][0].device
        if not params:
            return torch.zeros((), device=device)
        return torch.stack([p.grad.float().square().sum() for p in params]).sum()  # type: ignore[union-attr]
