"""DeepSeek-VL2-Tiny, smaller still: a folder in its public layout."""

from __future__ import annotations

import json
from functools import partial

import gemoe_ds.routers  # noqa: F401  (registers every router)
from gemoe_ds.hf_io.hf_config import meta_model
from gemoe_ds.models.deepseek_vl2.backbone import DeepseekVl2Backbone
from gemoe_ds.models.deepseek_vl2.model import DeepseekVl2Config, DeepseekVl2Model
from tests.models.small import make_model, write_random

VOCABULARY, LAYERS, HEADS, TOP_K, VISION_LAYERS, VISION_HEADS = 40, 3, 2, 3, 2, 2
SIDE = 5  # patches: odd, as in the public model


CONFIG = {  # the public file's keys
    "model_type": "deepseek_vl_v2",
    "tile_tag": "2D",
    "global_view_pos": "head",
    "language_config": {
        "model_type": "deepseek_v2",
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "intermediate_size": 48,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": TOP_K,
        "n_shared_experts": 2,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "use_mla": False,
        "q_lora_rank": None,
        "kv_lora_rank": None,
        "torch_dtype": "bfloat16",
    },
    "vision_config": {
        "layers": VISION_LAYERS,
        "width": 16,
        "heads": VISION_HEADS,
        "mlp_ratio": 1.5,
        "image_size": 14 * SIDE,
    },
    "projector_config": {"n_embed": 32},
}


def changed(**changes):
    return CONFIG | {"language_config": CONFIG["language_config"] | changes}


def write_deepseek_vl2(folder, vocabulary=None):
    """All keys of the public folder, those that nobody reads included, with random weights."""
    config = changed(vocab_size=max(vocabulary.values()) + 1 if vocabulary else VOCABULARY)
    return write_described(config, folder, {"vision.attn_pool.latent": (1, 1, 16)})


def write_described(config, folder, unused, std=0.3):
    """What such a config.json says, with random weights; `unused`: shapes that nobody reads."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    model = meta_model(DeepseekVl2Model, DeepseekVl2Config.from_json(config))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    stored = DeepseekVl2Backbone.keys.stored_shapes(shapes)
    return write_random(stored | unused, folder, std)


make = partial(make_model, "deepseek_vl2")
