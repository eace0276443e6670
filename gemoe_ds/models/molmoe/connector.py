"""From a CLIP tower's patches to rows of the language model: pooling by attention, then SwiGLU.

Shapes: N crops, P = 24 x 24 patches of width V (two layers of the tower side by side), Q = P / 4
pooled features, C connector width, D language model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Pooling(nn.Module):
    """Every 2 x 2 patches become one feature: their mean asks, the four answer."""

    def __init__(self, vision: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.wq, self.wk, self.wv = (nn.Linear(vision, width) for _ in range(3))
        self.wo = nn.Linear(width, width)

    def forward(self, patches_NPV: Tensor) -> Tensor:
        num_crops, num_patches, width = patches_NPV.shape
        side = round(num_patches**0.5)
        windows = patches_NPV.view(num_crops, side // 2, 2, side // 2, 2, width)
        windows = windows.transpose(2, 3).reshape(-1, 4, width)
        query = self._heads(self.wq(windows.mean(1, keepdim=True)))
        key, value = self._heads(self.wk(windows)), self._heads(self.wv(windows))
        device = "cuda" if patches_NPV.is_cuda else "cpu"  # also for tensors without memory
        with torch.autocast(device, enabled=False):  # in float32, as published
            pooled = nn.functional.scaled_dot_product_attention(
                query.float(), key.float(), value.float()
            )
        pooled_NQC = pooled.reshape(num_crops, -1, self.wo.in_features)
        out: Tensor = self.wo(pooled_NQC.to(patches_NPV.dtype))
        return out

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class Projector(nn.Module):
    """w2 (silu(w1 x) * w3 x), without biases."""

    def __init__(self, width: int, hidden: int, d_model: int) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, d_model, bias=False)

    def forward(self, features_NQC: Tensor) -> Tensor:
        gated = nn.functional.silu(self.w1(features_NQC)) * self.w3(features_NQC)
        out: Tensor = self.w2(gated)
        return out
