"""Decoder layers from their formulas, with plain torch functions on raw weights.

Nothing here calls a backbone or transformers. Weights are read as float64, so that a difference is
the model's own rounding, and not that of the formulas as well. Shapes: S tokens, D model, H heads
of d, E experts.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

BOUND = 1e-5  # the largest difference of a logit of a model in float32


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, float64."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= {key: tensor.double() for key, tensor in load_file(file).items()}
    return found


def assert_same(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours.double(), expected.double(), rtol=0, atol=BOUND)


def heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rotated(x_SHd: Tensor, theta: float) -> Tensor:
    """Rotary positions 0, 1, ..., half-split: dimension i turns with dimension i + d/2."""
    num_tokens, _, dim = x_SHd.shape
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=x_SHd.dtype) / dim)
    angle = torch.arange(num_tokens, dtype=x_SHd.dtype)[:, None] * frequency
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x_SHd[..., : dim // 2], x_SHd[..., dim // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def causal_attention(q_SHd: Tensor, k_SHd: Tensor, v_SHd: Tensor) -> Tensor:
    scores = torch.einsum("shd,thd->hst", q_SHd, k_SHd) / math.sqrt(q_SHd.shape[-1])
    future = torch.ones(len(q_SHd), len(q_SHd), dtype=torch.bool).triu(1)
    attention = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("hst,thd->shd", attention, v_SHd).flatten(1)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gated = x @ gate.t()
    return (gated * gated.sigmoid() * (x @ up.t())) @ down.t()


def moe(x_SD: Tensor, weights: dict[str, Tensor], top_k: int, norm_topk_prob: bool) -> Tensor:
    """Token by token; `weights` has gate.weight and experts.{e}.{gate,up,down}_proj.weight."""
    rows = []
    for x in x_SD:
        scores = (weights["gate.weight"] @ x).softmax(-1)
        chosen = scores.argsort(descending=True)[:top_k].tolist()
        total = scores[chosen].sum() if norm_topk_prob else 1.0
        row = torch.zeros_like(x)
        for e in chosen:
            names = (f"experts.{e}.{part}_proj.weight" for part in ("gate", "up", "down"))
            row = row + scores[e] / total * swiglu(x, *(weights[n] for n in names))
        rows.append(row)
    return torch.stack(rows)


def under(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in weights.items() if k.startswith(prefix)}
