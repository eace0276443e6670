"""Free experts: columns of the router after the routed experts, whose outputs cost next to nothing.

They live on every rank: what chooses them never travels, and is added while rows do.

Shapes: T tokens, D model, M free experts, C of them constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

ZeroComputationKind = Literal["zero", "copy", "constant"]


class ZeroComputationExperts(nn.Module):
    """The free experts of MoE++ (Jin et al., ICLR 2025, section 3.1); AdaMoE's nulls are `zero`.

    zero: 0; copy: x; constant: a1 x + a2 v with [a1, a2] = softmax(W_c x) and a learned v, one
    W_c and v each.
    """

    def __init__(self, kinds: Sequence[ZeroComputationKind], d_model: int) -> None:
        super().__init__()
        self.kinds = tuple(kinds)
        if count := self.kinds.count("constant"):
            self.mix_CD2 = nn.Parameter(torch.randn(count, d_model, 2) * 0.02)
            self.vector_CD = nn.Parameter(torch.randn(count, d_model) * 0.02)

    @property
    def all_zero(self) -> bool:
        """Whether all of them give 0, so that there is nothing to compute."""
        return set(self.kinds) <= {"zero"}

    def forward(self, x_TD: Tensor, mask_TM: Tensor, weights_TM: Tensor) -> Tensor:
        """sum over the chosen ones of weight * output, [T, D] in the dtype of x."""
        with torch.autocast(x_TD.device.type, enabled=False):
            used_TM = torch.where(mask_TM, weights_TM, 0.0)
            of_x_T = self._columns(used_TM, "copy").sum(1)
            if "constant" not in self.kinds:
                return x_TD * of_x_T[:, None].to(x_TD.dtype)
            used_TC = self._columns(used_TM, "constant")
            x_wide_TD = x_TD.to(used_TC.dtype)
            mix_CD2, vector_CD = (p.to(used_TC.dtype) for p in (self.mix_CD2, self.vector_CD))
            mix_TC2 = torch.einsum("td,cdm->tcm", x_wide_TD, mix_CD2).softmax(-1)
            of_x_T = of_x_T + (used_TC * mix_TC2[..., 0]).sum(1)
            constant_TD = (used_TC * mix_TC2[..., 1]) @ vector_CD
            return (x_wide_TD * of_x_T[:, None] + constant_TD).to(x_TD.dtype)

    def _columns(self, used_TM: Tensor, kind: ZeroComputationKind) -> Tensor:
        """Those of one kind. Views: a list of columns would be copied to a GPU, with a wait."""
        chosen = [used_TM[:, i] for i, one in enumerate(self.kinds) if one == kind]
        return torch.stack(chosen, 1) if chosen else used_TM[:, :0]
