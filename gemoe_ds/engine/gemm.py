"""The grouped product that suits this GPU: torch's, or where that is a loop DeepSpeed's kernel.

NOT run on a GPU yet: tests/engine/test_gemm.py does so where there is one.
"""

from __future__ import annotations

import torch
from deepspeed.ops.triton_ops.group_gemm_triton import _grouped_dw, group_gemm_triton
from torch import Tensor

from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.moe.experts.grouped_gemm import IDLE_MASKED, TORCH, GroupedGemm


class TritonGroupedGemm(GroupedGemm):
    """One kernel and no wait on GPUs where torch's product is a loop over experts."""

    def times(self, rows_AK: Tensor, weight_EKM: Tensor, ends_E: Tensor) -> Tensor:
        product: Tensor = group_gemm_triton(rows_AK, weight_EKM.contiguous(), ends_E)
        return product

    def times_transposed(self, rows_AK: Tensor, weight_EMK: Tensor, ends_E: Tensor) -> Tensor:
        product: Tensor = group_gemm_triton(rows_AK, weight_EMK.contiguous(), ends_E, trans_b=True)
        return product

    def weight_grad(self, grad_AM: Tensor, rows_AK: Tensor, ends_E: Tensor) -> Tensor:
        # Its public face would give this as a gradient only, after a product for nothing.
        gradient: Tensor = _grouped_dw(
            grad_AM.contiguous(), rows_AK.contiguous(), ends_E, len(ends_E)
        )
        return gradient


def grouped_gemm(device: torch.device) -> GroupedGemm:
    """The fastest one on this device."""
    if device.type != "cuda":
        return TORCH
    major, _ = torch.cuda.get_device_capability(device)
    if major == 9:
        return TORCH
    # Of later ones torch's product has a kernel for 10 alone, data centre Blackwell.
    return IDLE_MASKED if major == 10 else TritonGroupedGemm()


def choose_grouped_gemm(model: MoEModel, device: torch.device) -> None:
    """Let every layer of the model multiply with it."""
    for layer in model.moe_layers:
        layer.experts.gemm = grouped_gemm(device)
