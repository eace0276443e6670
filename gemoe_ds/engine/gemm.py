"""The grouped product that suits this GPU: torch's, or before Hopper DeepSpeed's Triton kernel.

NOT run on a GPU yet: tests/engine/test_gemm.py does so where there is one.
"""

from __future__ import annotations

import torch
from deepspeed.ops.triton_ops.group_gemm_triton import group_gemm_triton
from torch import Tensor

from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.moe.experts.grouped_gemm import TORCH, GroupedGemm


class TritonGroupedGemm(GroupedGemm):
    """One kernel and no wait on GPUs where torch's product is a loop over experts."""

    def times(self, rows_AK: Tensor, weight_EKM: Tensor, ends_E: Tensor) -> Tensor:
        product: Tensor = group_gemm_triton(rows_AK, weight_EKM.contiguous(), ends_E)
        return product

    def times_transposed(self, rows_AK: Tensor, weight_EMK: Tensor, ends_E: Tensor) -> Tensor:
        product: Tensor = group_gemm_triton(rows_AK, weight_EMK.contiguous(), ends_E, trans_b=True)
        return product

    def weight_grad(self, grad_AM: Tensor, rows_AK: Tensor, ends_E: Tensor) -> Tensor:
        """Its public face gives this one as the gradient of a product only, which comes on top."""
        shape = (len(ends_E), grad_AM.shape[1], rows_AK.shape[1])
        with torch.enable_grad():
            weight_EMK = rows_AK.new_zeros(shape).requires_grad_()
            product = group_gemm_triton(rows_AK.detach(), weight_EMK, ends_E, trans_b=True)
            (grad_EMK,) = torch.autograd.grad(product, weight_EMK, grad_AM)
        return grad_EMK


def grouped_gemm(device: torch.device) -> GroupedGemm:
    """The faster one of the two on this device."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return TritonGroupedGemm()
    return TORCH


def choose_grouped_gemm(model: MoEModel, device: torch.device) -> None:
    """Let every layer of the model multiply with it."""
    for layer in model.moe_layers:
        layer.experts.gemm = grouped_gemm(device)
