"""Floating-point operations of one token through the language model, from what was routed."""

from __future__ import annotations

from typing import Any

from torch import nn

from gemoe_ds.models.moe_model import MoEModel


def flops_per_token(model: MoEModel, mean_k_L: list[float], context: float) -> dict[str, float]:
    """By part; an addition and a multiplication count as two.

    `mean_k_L` are real experts visited, by MoE layer; `context` is how many tokens a token attends
    to on average, itself included. Matrix products only: norms, activations, rotary embeddings and
    the embedding itself are left out, as they are by torch's FlopCounterMode. The vision tower,
    which works by image, is left out too.
    """
    layers = model.moe_layers
    text: Any = model.hf.get_submodule(model.block_paths[0].partition(".layers.")[0])
    bases = [layer.base for layer in layers if layer.base is not None]  # which do not run
    of_moe = {id(m) for r in [*(layer.router for layer in layers), *bases] for m in r.modules()}
    dense = [m for m in text.modules() if isinstance(m, nn.Linear) and id(m) not in of_moe]
    widths = [m.q_proj.out_features for m in text.modules() if _attends(m)]
    router = [p for layer in layers for p in layer.router.parameters() if p.dim() >= 2]
    visits = zip(mean_k_L, model.params_per_expert, strict=True)
    head = model.backbone.head(model.hf)
    return {
        "dense": 2 * sum(_size(m) for m in dense),
        "attention": 4 * sum(widths) * context,  # scores, and the sum over values
        "router": 2 * sum(p.numel() for p in router),
        "experts": 2 * sum(k * size for k, size in visits),
        "head": 2 * sum(_size(m) for m in head.modules() if isinstance(m, nn.Linear)),
    }


def _size(linear: nn.Linear) -> int:
    return linear.in_features * linear.out_features


def _attends(module: nn.Module) -> bool:
    return isinstance(getattr(module, "q_proj", None), nn.Linear)
