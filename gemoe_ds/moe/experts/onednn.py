"""oneDNN's linear map, called by name: the one place of these private operations of torch.

torch multiplies float32 with MKL: 2 to 3 times slower than this for a router's product on an AMD
EPYC (Zen 5). Shapes: n rows, K inputs, M outputs.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_EXPECTED_ROWS = 512


def usable(tensor: Tensor) -> bool:
    """float32, or bfloat16 where the CPU has instructions for it."""
    if tensor.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return tensor.dtype == torch.float32 or (tensor.dtype == torch.bfloat16 and _has_bfloat16())


def multiplies_slowly(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies in a plain loop: bfloat16 on a CPU without instructions for it.

    On an AMD EPYC (Zen 3, AVX2) a product of 64 rows takes 5 times as long as one in float32, the
    conversion of its weight included.
    """
    return device.type == "cpu" and dtype == torch.bfloat16 and not _has_bfloat16()


@functools.cache
def _has_bfloat16() -> bool:
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def multiplies_in_tiles(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this is bfloat16 on a CPU with AMX.

    There one row and a weight of 2 MB take two thirds of the time if they are a vector and a matrix
    (Intel Xeon, 0.33 ms against 0.48). With AVX-512's instructions alone that takes half as long
    again as the product of two matrices.
    """
    return device.type == "cpu" and dtype == torch.bfloat16 and _has_tiles()


@functools.cache
def _has_tiles() -> bool:
    return bool(_has_bfloat16() and torch.cpu._is_amx_tile_supported())


def linear(rows_nK: Tensor, weight_MK: Tensor) -> Tensor:
    """rows @ weight.T, [n, M]; no autograd. The weight may come from `packed`."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(
        rows_nK.contiguous(), weight_MK, None, "none", [], ""
    )
    return product


def packed(weight_MK: Tensor) -> Tensor:
    """The weight in oneDNN's own layout, for products of about `_EXPECTED_ROWS`."""
    reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(
        weight_MK.contiguous(), _EXPECTED_ROWS
    )
    return reordered
