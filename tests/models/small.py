"""Small folders and models of every backbone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.moe_model import ExpertShard, MoEModel
from gemoe_ds.moe.router import Router


def write_random(shapes: Mapping[str, tuple[int, ...]], folder: Path) -> Path:
    """Random tensors of these keys and shapes, norms about 1."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, shape in shapes.items():
        tensors[key] = torch.randn(shape, generator=generator) * 0.3
        if ("norm" in key or "ln_" in key) and key.endswith("weight"):
            tensors[key] += 1
    save_file(tensors, folder / "model.safetensors")
    return folder


def make_model(
    name: str,
    folder: Path,
    router: str = "top_k",
    shard: ExpertShard | None = None,
    *,
    backbone: Mapping[str, object] | None = None,
    **options: object,
) -> MoEModel:
    """The model of backbone `name` in a folder; `backbone` are the backbone's own options."""
    chosen, family = Router.named(router), Backbone.named(name)
    torch.manual_seed(0)
    return MoEModel(
        family(family.Config(**(backbone or {}))),
        folder,
        folder,
        (chosen, chosen.Config()),
        shard=shard,
        **options,
    )
