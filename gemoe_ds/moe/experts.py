"""Routed experts: stacked SwiGLU FFNs applied to rows that stand expert-major.

Shapes: A assignment rows, E experts held here, D model, F expert width, G = 2 F (gate and up).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# What torch's grouped matrix product is known to take; anything else goes expert by expert.
_GROUPED_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}


class Experts(nn.Module):
    """E SwiGLU experts: y = W_down (silu(W_gate x) * W_up x).

    Frozen experts are non-persistent buffers: no optimizer, no checkpoint and no ZeRO stage ever
    sees them, so each rank can hold its own shard. They cost no weight gradient, and autograd
    saves none of their inputs. Trainable experts are ordinary parameters.
    """

    gate_up_EGD: Tensor
    down_EDF: Tensor

    def __init__(self, gate_up_EGD: Tensor, down_EDF: Tensor, *, trainable: bool) -> None:
        super().__init__()
        num_experts, gate_up_width, d_model = gate_up_EGD.shape
        assert down_EDF.shape == (num_experts, d_model, gate_up_width // 2)
        for name, tensor in (("gate_up_EGD", gate_up_EGD), ("down_EDF", down_EDF)):
            if trainable:
                setattr(self, name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor.detach(), persistent=False)

    @property
    def num_experts(self) -> int:
        return self.down_EDF.shape[0]

    def forward(self, rows_AD: Tensor, weights_A: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
        """weight * y, [A, D], in the dtype of the rows; A = 0 and idle experts are ordinary.

        The combine weight enters before the down projection, which is linear: F numbers a row to
        multiply and to keep for the backward pass instead of D (at D = 16 F, 13 % of a step).
        """
        gate_AF, up_AF = grouped_linear(rows_AD, self.gate_up_EGD, tokens_per_expert_E).chunk(2, -1)
        hidden_AF = nn.functional.silu(gate_AF) * up_AF
        hidden_AF = (hidden_AF * weights_A[:, None]).to(hidden_AF.dtype)
        return grouped_linear(hidden_AF, self.down_EDF, tokens_per_expert_E).to(rows_AD.dtype)


def grouped_linear(rows_AK: Tensor, weight_EMK: Tensor, rows_per_expert_E: Tensor) -> Tensor:
    """rows @ weight[e].T for the rows of each expert e, [A, M]; rows stand expert-major."""
    device = rows_AK.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(rows_AK.dtype, weight_EMK.dtype)
    rows_AK, weight_EMK = rows_AK.to(dtype), weight_EMK.to(dtype)
    # it wants rows of whole 16 bytes
    aligned = all(n * dtype.itemsize % 16 == 0 for n in weight_EMK.shape[1:])
    if dtype in _GROUPED_DTYPES.get(device, ()) and aligned and rows_AK.shape[0]:
        ends_E = rows_per_expert_E.cumsum(0).to(torch.int32)
        out_AM = nn.functional.grouped_mm(rows_AK, weight_EMK.transpose(1, 2), offs=ends_E)
        if out_AM.requires_grad:  # its backward refuses an expanded gradient, such as that of sum()
            out_AM.register_hook(Tensor.contiguous)  # type: ignore[no-untyped-call]
        return out_AM
    parts = torch.split(rows_AK, rows_per_expert_E.tolist())
    return torch.cat([part @ weight.t() for part, weight in zip(parts, weight_EMK, strict=True)])
