"""Model and collator of a configuration."""

from __future__ import annotations

from pathlib import Path

import torch

from gemoe_ds.backbones.backbone import Backbone
from gemoe_ds.backbones.images import ImageLayout
from gemoe_ds.backbones.memory import ALONE, Memory
from gemoe_ds.backbones.model import ExpertShard, MoEModel
from gemoe_ds.backbones.tokenizer import load_tokenizer
from gemoe_ds.config import RunConfig
from gemoe_ds.data.collate import Collator
from gemoe_ds.moe.router import Router


def build_model(
    config: RunConfig,
    shard: ExpertShard,
    memory: Memory = ALONE,
    *,
    show_progress: bool = False,
) -> MoEModel:
    """The converted model that a configuration describes, experts of this shard only.

    Collective if the memory is common to several ranks.

    Seeded here: a router may hold random parameters that do not train, which evaluation and
    export must draw alike.
    """
    torch.manual_seed(config.seed)
    router = config.model.router
    return MoEModel(
        named_backbone(config),
        Path(config.model.checkpoint) if config.model.checkpoint else None,
        Path(config.data.tokenizer),
        (Router.named(router.name), router.config),
        train=config.model.train,
        dtype=getattr(torch, config.model.dtype),
        shard=shard,
        recompute=config.model.recompute,
        pack_experts=config.model.pack_experts,
        memory=memory,
        show_progress=show_progress,
    )


def named_backbone(config: RunConfig) -> Backbone:
    """The adapter of a configuration's backbone; nothing is loaded."""
    backbone = config.model.backbone
    return Backbone.named(backbone.name)(backbone.config)


def build_collator(config: RunConfig, model: MoEModel) -> Collator:
    """The collator that fits a model's images and chat and a configuration's tokenizer."""
    return collator_of(config, model.backbone, model.image_layout)


def collator_of(config: RunConfig, backbone: Backbone, layout: ImageLayout | None) -> Collator:
    token = layout.token if layout else None
    return Collator(
        load_tokenizer(Path(config.data.tokenizer), backbone.chat, token),
        layout,
        backbone.chat,
        max_length=config.data.max_length,
    )
