"""OLMoE in one file, and models of folders that may be wrong."""

from __future__ import annotations

from safetensors.torch import load_file, save_file

import gemoe_ds.routers  # noqa: F401  (registers every router)
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.moe.router import Router

TOP_K = (Router.named("top_k"), Router.named("top_k").Config())


def make(name, folder):
    backbone = Backbone.named(name)
    return MoEModel.from_checkpoint(backbone(backbone.Config()), folder, folder, TOP_K)


def with_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage
