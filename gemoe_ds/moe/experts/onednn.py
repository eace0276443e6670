"""oneDNN's linear map, called by name: the one place of these private operations of torch.

torch multiplies float32 with MKL: 2 to 3 times slower than this for a router's product on an AMD
EPYC (Zen 5). Shapes: n rows, K inputs, M outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def usable(tensor: Tensor) -> bool:
    """float32, or bfloat16 where the CPU has instructions for it."""
    if tensor.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if tensor.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return tensor.dtype == torch.float32


def linear(rows_nK: Tensor, weight_MK: Tensor) -> Tensor:
    """rows @ weight.T, [n, M]; no autograd. The weight may come from `packed`."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(
        rows_nK.contiguous(), weight_MK, None, "none", [], ""
    )
    return product


def packed(weight_MK: Tensor, expected_rows: int = 512) -> Tensor:
    """The weight in oneDNN's own layout for products of about so many rows."""
    reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(
        weight_MK.contiguous(), expected_rows
    )
    return reordered
