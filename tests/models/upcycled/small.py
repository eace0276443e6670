"""A small dense LLaVA, and what becomes of it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from gemoe_ds.config.load import config_from_dict
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.moe.router import Router
from tests.helpers import repository
from tests.tiny import WORDS, model_inputs

LAYERS = 4


def write_dense(folder: Path, **text: object) -> Path:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    options = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**options | text),
        image_token_id=3,
        vision_feature_layer=-1,
        image_seq_length=4,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).float().save_pretrained(folder)
    return folder


def load(setting, checkpoint="dense", router="top_k", train="experts", **options):
    backbone = Backbone.named("upcycled")
    chosen = Router.named(router)
    torch.manual_seed(0)
    return MoEModel.from_checkpoint(
        backbone(backbone.Config(**options)),
        setting[checkpoint] if isinstance(checkpoint, str) else checkpoint,
        setting["tokenizer"],
        (chosen, chosen.Config()),
        train=train,
    )


def dense_logits(setting, batch):
    model = LlavaForConditionalGeneration.from_pretrained(setting["dense"], dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(
            batch["input_ids_BS"],
            pixel_values=batch["images"]["pixels"],
            attention_mask=batch["is_valid_BS"].long(),
        ).logits


def logits_of(model, batch):
    with torch.no_grad():
        return model.backbone.head(model.hf)(model.eval().hidden(model_inputs(batch)))


def make_config(setting, output: Path, router: dict, ep_size: int, zero: int, **model: object):
    return config_from_dict(
        {
            "output_dir": str(output),
            "model": {
                "backbone": {"name": "upcycled"},
                "checkpoint": str(setting["dense"]),
                "router": router,
                "trainable": "experts",
                "dtype": "float32",
            }
            | model,
            "data": {"train_path": str(setting["data"]), "tokenizer": str(setting["tokenizer"])},
            "optim": {"lr": 2e-3, "eps": 1e-3},
            "parallel": {"ep_size": ep_size},
            "train": {"steps": 4, "micro_batch_size": 1, "global_batch_size": 4},
            "monitor": {"every": 1, "tensorboard": False},
            "deepspeed": str(repository() / f"ds_configs/zero{zero}.json"),
        }
    )
