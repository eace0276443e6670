"""The four matrix products of SwiGLU experts: with weights as they are, packed by oneDNN, or codes.

oneDNN multiplies blocks in a layout of its own and repacks the right operand in every call. For a
few hundred rows that is up to a sixth of the time, and all of it memory traffic, the same for
k = 5 as for k = 8. Frozen weights can be packed once: two more copies of them (the backward pass
multiplies by the other side), so it is for layers that are small beside the machine.

Shapes: n rows of one expert, A of all, expert-major; E experts, D model, F expert width, G = 2 F;
ends_E int32, inclusive row counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemoe_ds.moe.experts import onednn, quantised_kernels
from gemoe_ds.moe.experts.grouped_gemm import TORCH, GroupedGemm
from gemoe_ds.moe.experts.quantised import QuantisedWeight

SMALL_FFN = 1 << 17  # D * F; at 100 rows an expert, products of 0.1 GFLOP
_FEW_ROWS = 192  # below, the other side is 5 to 15 % faster (bf16, weights of 2048 x 2048)


def product_dtype(
    device: torch.device, dtype: torch.dtype, d_model: int, width: int
) -> torch.dtype:
    """In which the products of `dtype` run, and what is kept of them for the backward pass."""
    is_large = d_model * width > SMALL_FFN  # whose weights are not copied all at once
    return torch.float32 if is_large and onednn.multiplies_slowly(device, dtype) else dtype


class ExpertWeights:
    """Products of rows with one expert's weights, or (`.._of_all`) by `gemm` with all, in `dtype`.

    bfloat16 where the CPU has no instructions for it is multiplied in float32, which takes a fifth
    of the time at 64 rows an expert; `narrow` is then bfloat16, for a row or two.
    """

    one_by_one = False  # whether plain torch has the weights of an expert at a time, not of all

    def __init__(
        self,
        gate_up_EGD: Tensor,
        down_EDF: Tensor,
        dtype: torch.dtype,
        gemm: GroupedGemm = TORCH,
    ) -> None:
        self.gate_up_EGD, self.down_EDF, self.gemm = gate_up_EGD, down_EDF, gemm
        self.width = down_EDF.shape[2]
        self.dtype = product_dtype(gate_up_EGD.device, dtype, *down_EDF.shape[1:])
        self.narrow = None if self.dtype == dtype else dtype

    def gate_up(self, rows_nD: Tensor, expert: int) -> Tensor:
        return _times_transposed(rows_nD, self._gate_up_GD(expert))

    def down(self, rows_nF: Tensor, expert: int) -> Tensor:
        return _times_transposed(rows_nF, self._down_DF(expert))

    def down_grad(self, grad_nD: Tensor, expert: int) -> Tensor:
        """Gradient of the down projection's input, [n, F]."""
        return grad_nD @ self._down_DF(expert)

    def gate_up_grad(self, grad_nG: Tensor, expert: int) -> Tensor:
        """Gradient of the gate and up projections' input, [n, D]."""
        return grad_nG @ self._gate_up_GD(expert)

    def gate_up_of_all(self, rows_AD: Tensor, ends_E: Tensor) -> Tensor:
        return self.gemm.times_transposed(rows_AD, self.gate_up_EGD.to(self.dtype), ends_E)

    def down_of_all(self, rows_AF: Tensor, ends_E: Tensor) -> Tensor:
        return self.gemm.times_transposed(rows_AF, self.down_EDF.to(self.dtype), ends_E)

    def down_grad_of_all(self, grad_AD: Tensor, ends_E: Tensor) -> Tensor:
        return self.gemm.times(grad_AD, self.down_EDF.to(self.dtype), ends_E)

    def gate_up_grad_of_all(self, grad_AG: Tensor, ends_E: Tensor) -> Tensor:
        return self.gemm.times(grad_AG, self.gate_up_EGD.to(self.dtype), ends_E)

    def _gate_up_GD(self, expert: int) -> Tensor:
        return self.gate_up_EGD[expert].to(self.dtype)

    def _down_DF(self, expert: int) -> Tensor:
        return self.down_EDF[expert].to(self.dtype)


def _times_transposed(rows_nK: Tensor, weight_MK: Tensor) -> Tensor:
    """rows @ weight.T, [n, M]. The right operand is repacked: for few rows, let it be the rows."""
    if rows_nK.shape[0] < _FEW_ROWS:
        return (weight_MK @ rows_nK.t()).t().contiguous()
    return rows_nK @ weight_MK.t()


class QuantisedExpertWeights(ExpertWeights):
    """The same from codes: an expert that has rows is dequantised once for each product.

    All are multiplied at once where Triton is, whose kernels dequantise within the product.
    """

    one_by_one = True

    def __init__(self, gate_up: QuantisedWeight, down: QuantisedWeight, dtype: torch.dtype) -> None:
        self.quantised = gate_up, down
        # What autograd and the paths look at: frozen, and on the device of the weights.
        self.gate_up_EGD, self.down_EDF = gate_up.codes_EMC, down.codes_EMC
        self.width = down.shape[2]
        self.dtype = product_dtype(self.down_EDF.device, dtype, *down.shape[1:])
        self.narrow = None if self.dtype == dtype else dtype

    def gate_up_of_all(self, rows_AD: Tensor, ends_E: Tensor) -> Tensor:
        return quantised_kernels.times_transposed(rows_AD, self.quantised[0], ends_E)

    def down_of_all(self, rows_AF: Tensor, ends_E: Tensor) -> Tensor:
        return quantised_kernels.times_transposed(rows_AF, self.quantised[1], ends_E)

    def down_grad_of_all(self, grad_AD: Tensor, ends_E: Tensor) -> Tensor:
        return quantised_kernels.times(grad_AD, self.quantised[1], ends_E)

    def gate_up_grad_of_all(self, grad_AG: Tensor, ends_E: Tensor) -> Tensor:
        return quantised_kernels.times(grad_AG, self.quantised[0], ends_E)

    def _gate_up_GD(self, expert: int) -> Tensor:
        return self.quantised[0].dequantised(expert, self.dtype, until_next=True)

    def _down_DF(self, expert: int) -> Tensor:
        return self.quantised[1].dequantised(expert, self.dtype, until_next=True)


class PackedExpertWeights(ExpertWeights):
    """The same from packed copies of frozen weights, made once; `can_pack` says where it works."""

    def __init__(self, gate_up_EGD: Tensor, down_EDF: Tensor) -> None:
        super().__init__(gate_up_EGD, down_EDF, gate_up_EGD.dtype)
        self._packed: dict[str, list[Tensor]] = {}

    @staticmethod
    def can_pack(weights: Tensor, dtype: torch.dtype) -> bool:
        """bfloat16 on a CPU with instructions for it, multiplied as it is stored."""
        return weights.dtype == dtype == torch.bfloat16 and onednn.usable(weights)

    def gate_up(self, rows_nD: Tensor, expert: int) -> Tensor:
        return self._times("gate_up", rows_nD, self.gate_up_EGD, expert)

    def down(self, rows_nF: Tensor, expert: int) -> Tensor:
        return self._times("down", rows_nF, self.down_EDF, expert)

    def down_grad(self, grad_nD: Tensor, expert: int) -> Tensor:
        return self._times("down_grad", grad_nD, self.down_EDF.mT, expert)

    def gate_up_grad(self, grad_nG: Tensor, expert: int) -> Tensor:
        return self._times("gate_up_grad", grad_nG, self.gate_up_EGD.mT, expert)

    def _times(self, name: str, rows: Tensor, weight_EMK: Tensor, expert: int) -> Tensor:
        """rows @ weight[expert].T; all experts are packed at the first use."""
        if name not in self._packed:
            self._packed[name] = [onednn.packed(weight_MK) for weight_MK in weight_EMK]
        return onednn.linear(rows, self._packed[name][expert])
