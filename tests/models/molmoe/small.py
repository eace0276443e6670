"""MolmoE-1B, smaller: a folder in its public layout."""

from __future__ import annotations

import json
from functools import partial

import gemoe_ds.routers  # noqa: F401  (registers every router)
from gemoe_ds.hf_io.hf_config import meta_model
from gemoe_ds.models.molmoe.backbone import MolmoeBackbone
from gemoe_ds.models.molmoe.model import MolmoeConfig, MolmoeModel
from tests.models.small import make_model, write_random

VOCABULARY, LAYERS, HEADS, TOP_K, VISION_HEADS = 40, 2, 2, 3, 2
CONFIG = {  # the public file's keys, and those of a small tower
    "model_type": "molmo",
    "architectures": ["OLMoForCausalLM"],
    "d_model": 32,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "n_kv_heads": None,
    "mlp_ratio": 1,
    "moe_num_experts": 8,
    "moe_top_k": TOP_K,
    "vocab_size": VOCABULARY,
    "embedding_size": VOCABULARY,
    "attention_layer_norm": True,
    "include_bias": False,
    "norm_after": False,
    "weight_tying": False,
    "image_size": 12 * 14,
    "vision_width": 16,
    "vision_heads": VISION_HEADS,
    "vision_ffn": 24,
    "vision_layers": [2, 1],
    "connector_width": 16,
}


def write_molmoe(folder, vocabulary=None):
    """All keys of the public folder, those that nobody reads included, with random weights."""
    size = max(vocabulary.values()) + 1 if vocabulary else VOCABULARY
    folder.mkdir(exist_ok=True)
    config = CONFIG | {"vocab_size": size, "embedding_size": size}
    (folder / "config.json").write_text(json.dumps(config))
    model = meta_model(MolmoeModel, MolmoeConfig.from_json(config))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    stored = MolmoeBackbone.keys.stored_shapes(shapes)
    stored["model.transformer.wte.new_embedding"] = (128, 32)
    stored["model.vision_backbone.image_vit.transformer.resblocks.22.ffn_norm.bias"] = (16,)
    return write_random(stored, folder)


make = partial(make_model, "molmoe")
