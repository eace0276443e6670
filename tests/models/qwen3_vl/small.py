"""Qwen3-VL-MoE small: a folder in its public layout; the image layout of the public ones."""

from __future__ import annotations

import copy
import json

import torch
from safetensors.torch import save_file
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import gemoe_ds.routers  # noqa: F401  (registers every router)
from gemoe_ds.models.qwen3_vl.backbone import Qwen3VLBackbone
from gemoe_ds.models.qwen3_vl.images import Qwen3VLImages, tables

VOCABULARY, LAYERS, HEADS, KV_HEADS, DIM, TOP_K, EPS = 40, 3, 4, 2, 8, 3, 1e-6
IMAGE = 30
CONFIG = {
    "model_type": "qwen3_vl_moe",
    "image_token_id": IMAGE,
    "vision_start_token_id": 31,
    "vision_end_token_id": 32,
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "qwen3_vl_moe_text",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 12,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "num_experts": 8,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rms_norm_eps": EPS,
        "rope_theta": 5000000,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
            "rope_type": "default",
        },
        "tie_word_embeddings": False,
    },
    "vision_config": {
        "model_type": "qwen3_vl_moe",
        "depth": 3,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 2,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 16,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0, 2],
        "hidden_act": "gelu_pytorch_tanh",
    },
}


def write_qwen3_vl(folder, vocabulary=None, **text):
    """The public layout, written by hand: experts [E, in, out]. `text` changes its text_config."""
    config = copy.deepcopy(CONFIG)
    config["text_config"] |= text
    if vocabulary:
        config["text_config"]["vocab_size"] = max(vocabulary.values()) + 1
        config["image_token_id"] = vocabulary["<|image_pad|>"]
        config["vision_start_token_id"] = vocabulary["<|vision_start|>"]
        config["vision_end_token_id"] = vocabulary["<|vision_end|>"]
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": 16, "longest_edge": 256},
        "patch_size": 2,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig.from_pretrained(folder))
    tensors = {}
    for name, parameter in model.state_dict().items():
        tensor = torch.randn_like(parameter) * 0.3
        if "norm" in name and name.endswith("weight"):
            tensor = 1 + tensor
        shape = parameter.shape
        tensors[name] = tensor.view(shape[0], shape[2], shape[1]) if ".experts." in name else tensor
    save_file(tensors, folder / "model.safetensors")
    return folder


PUBLIC = dict(Qwen3VLBackbone.published_processor)


def layout(**changes) -> Qwen3VLImages:
    return Qwen3VLImages(Qwen2VLImageProcessorPil(**PUBLIC | changes))


def looked_up(*grids):
    """What the layout gives beside the pixels, of images of so many patches."""
    every = [tables(torch.tensor([grid]), position_side=4) for grid in grids]
    return {name: torch.cat([one[name] for one in every]) for name in every[0]}
