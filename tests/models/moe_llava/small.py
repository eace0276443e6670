"""MoE-LLaVA small, on both of its language models: folders in their public layouts."""

from __future__ import annotations

import json

import gemoe_ds.routers  # noqa: F401  (registers every router)
from gemoe_ds.hf_io.hf_config import meta_model
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.moe_llava.model import MoeLlavaModel
from tests.models.small import make_model, write_random

D, HEADS, WIDTH, LAYERS, VOCABULARY, VISION_HEADS = 32, 2, 24, 3, 40, 2
SHARED = {
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY,
    "mm_image_tower": "openai/clip-vit-large-patch14-336",
    "image_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "moe": {
        "moe_mode": "sparse",
        "moe_layers_idx": [0, 2],
        "num_experts": [4, 4],
        "top_k_experts": 2,
        "capacity_factor": 1.5,
        "use_residual": False,
    },
    "vision": {"image_size": 42, "width": 16, "layers": 2, "heads": VISION_HEADS, "ffn": 24},
}


CONFIGS = {
    "moe_llava_stablelm": SHARED
    | {"model_type": "moe_llava_stablelm", "intermediate_size": WIDTH, "rope_pct": 0.25},
    "moe_llava_qwen": SHARED | {"model_type": "moe_llava_qwen", "intermediate_size": 2 * WIDTH},
}


NAMES = list(CONFIGS)


def write_moe_llava(name, folder, vocabulary=None):
    backbone = Backbone.named(name)
    size = max(vocabulary.values()) + 1 if vocabulary else VOCABULARY
    config = CONFIGS[name] | {"vocab_size": size}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    model = meta_model(MoeLlavaModel, backbone.config_class.from_json(config))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    stored = backbone.keys.stored_shapes(shapes)
    prefix = "transformer" if name.endswith("qwen") else "model"
    stored[f"{prefix}.image_tower.image_tower.vision_model.embeddings.position_ids"] = (1, 10)
    return write_random(stored, folder)


def make(name, folder, shard=None, vision_tower=None, **options):
    tower = {"vision_tower": vision_tower}
    return make_model(name, folder, shard=shard, backbone=tower, **options)
