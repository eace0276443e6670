"""Model and collator of a configuration."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from gemoe_ds.config import RunConfig
from gemoe_ds.data.collate import Collator
from gemoe_ds.errors import ConfigError
from gemoe_ds.hf_io.allocator import LOCAL, WeightAllocator
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.images import ImageLayout
from gemoe_ds.models.kv_cache import PACKS, attention_of
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.models.tokenizer import load_tokenizer
from gemoe_ds.moe.router import Router


def build_model(
    config: RunConfig,
    shard: ExpertShard,
    memory: WeightAllocator = LOCAL,
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
    model = MoEModel.from_checkpoint(
        named_backbone(config),
        Path(config.model.checkpoint) if config.model.checkpoint else None,
        Path(config.data.tokenizer),
        (Router.named(router.name), router.config),
        train=config.model.trainable,
        dtype=getattr(torch, config.model.dtype),
        experts_dtype=config.model.experts_dtype,
        dense_dtype=config.model.dense_dtype,
        shard=shard,
        activation_checkpointing=config.model.activation_checkpointing,
        pack_experts=config.model.pack_experts,
        memory=memory,
        show_progress=show_progress,
    )
    model.distill = config.train.distill
    for layer in model.moe_layers:
        layer.dense_gradient = config.model.gate_gradient == "dense"
    return model


def named_backbone(config: RunConfig) -> Backbone:
    """The adapter of a configuration's backbone; nothing is loaded."""
    backbone = config.model.backbone
    return Backbone.named(backbone.name)(backbone.config)


def build_collator(config: RunConfig, model: MoEModel) -> Collator:
    """The collator that fits a model's images and chat and a configuration's tokenizer."""
    return _collator(config, model.backbone, model.image_layout, model.context_length)


def collator_of(config: RunConfig, backbone: Backbone, hf: nn.Module) -> Collator:
    """The same of what the backbone has loaded, before it is converted."""
    return _collator(config, backbone, backbone.image_layout(hf), backbone.context_length(hf))


def meta_collator(config: RunConfig) -> Collator:
    """The same where nothing is loaded: from headers."""
    backbone, base = named_backbone(config), config.model.checkpoint
    hf = backbone.load(Path(base) if base else None, Path(config.data.tokenizer))
    check_attention(config, hf)
    return collator_of(config, backbone, hf)


def check_attention(config: RunConfig, hf: nn.Module) -> None:
    """ConfigError if `data.pack` cannot be: attention that would see other documents of a row."""
    if not config.data.pack:
        return
    if other := attention_of(hf) - {*PACKS}:
        raise ConfigError(
            f"data.pack=true: the model's attention is {min(other)!r}, and packed rows are made "
            f"for {' and '.join(PACKS)}; set data.pack=false"
        )


def _collator(
    config: RunConfig, backbone: Backbone, layout: ImageLayout | None, limit: int | None
) -> Collator:
    """ConfigError for sequences that are too long for the model."""
    if limit is not None and config.data.max_length > limit:
        raise ConfigError(
            f"data.max_length={config.data.max_length}: the model knows positions up to {limit}; "
            f"set data.max_length={limit} or less"
        )
    token = layout.token if layout else None
    return Collator(
        load_tokenizer(Path(config.data.tokenizer), backbone.chat, token),
        layout,
        backbone.chat,
        max_length=config.data.max_length,
    )
