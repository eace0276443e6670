"""The grouped matrix product of all experts: torch's own, and the shape of any other.

Shapes: A assignment rows, expert-major; E experts; K, M widths; ends_E int32, inclusive row counts.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import grouped_mm


class GroupedGemm:
    """torch's: one kernel on GPUs of compute capability 9 and 10, a loop with waits on others."""

    def times(self, rows_AK: Tensor, weight_EKM: Tensor, ends_E: Tensor) -> Tensor:
        """rows @ weight[e] for the rows of each expert, [A, M]."""
        return grouped_mm(rows_AK, weight_EKM, offs=ends_E)

    def times_transposed(self, rows_AK: Tensor, weight_EMK: Tensor, ends_E: Tensor) -> Tensor:
        """rows @ weight[e].T for the rows of each expert, [A, M]."""
        return grouped_mm(rows_AK, weight_EMK.mT, offs=ends_E)

    def weight_grad(self, grad_AM: Tensor, rows_AK: Tensor, ends_E: Tensor) -> Tensor:
        """grad.T @ rows over the rows of each expert, [E, M, K]; 0 for an idle one."""
        return grouped_mm(grad_AM.t(), rows_AK, offs=ends_E)


class IdleMaskedGroupedGemm(GroupedGemm):
    """torch's where its weight gradients of idle experts are not 0 (pytorch #172439: sm_100)."""

    def weight_grad(self, grad_AM: Tensor, rows_AK: Tensor, ends_E: Tensor) -> Tensor:
        is_idle_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
        return (
            super().weight_grad(grad_AM, rows_AK, ends_E).masked_fill_(is_idle_E[:, None, None], 0)
        )


TORCH, IDLE_MASKED = GroupedGemm(), IdleMaskedGroupedGemm()
