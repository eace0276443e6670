"""Stock models of every family that convert() takes, tiny and with random weights; a batch."""

from __future__ import annotations

import copy
import functools

import torch
from transformers import (
    CLIPVisionConfig,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel

from gemoe_ds.models.convert import convert

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 16}
MLA = {
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
IMAGE = 90


def olmoe(**changes):
    return OlmoeForCausalLM(
        OlmoeConfig(**SIZES | {"num_experts": 8, "num_experts_per_tok": 4} | changes)
    )


def mixtral(**changes):
    return MixtralForCausalLM(MixtralConfig(**SIZES | {"num_local_experts": 8} | changes))


def qwen3(**changes):
    options = {"head_dim": 8, "norm_topk_prob": True} | changes
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | MOE | options))


def qwen2():
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES | MOE, shared_expert_intermediate_size=24))


def deepseek_v2(**changes):
    options = {"n_routed_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 16}
    options |= {"n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5}
    return DeepseekV2ForCausalLM(DeepseekV2Config(**SIZES | MLA | options | changes))


def deepseek_vl2():
    """Its language model."""
    options = {"n_routed_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 16}
    return DeepseekOcr2TextModel(
        DeepseekOcr2TextConfig(
            **SIZES | options,
            n_shared_experts=2,
            head_dim=8,
            topk_method="greedy",
            mlp_layer_types=["dense", "sparse"],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )


def llava():
    text = OlmoeConfig(**SIZES | {"num_experts": 8, "num_experts_per_tok": 4})
    vision = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "image_size": 8}
    vision = CLIPVisionConfig(**vision, num_attention_heads=2, patch_size=4)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    )


def qwen3_vl():
    text = {k: v for k, v in (SIZES | MOE).items() if not k.endswith("_token_id")}
    text |= {"head_dim": 8, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"intermediate_size": 16, "deepstack_visual_indexes": [0]}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
    return Qwen3VLMoeForConditionalGeneration(config)


FAMILIES = {
    f.__name__: f
    for f in (olmoe, mixtral, qwen2, qwen3, qwen3_vl, deepseek_v2, deepseek_vl2, llava)
}


@functools.cache
def _stock(name):
    torch.manual_seed(0)
    return FAMILIES[name]().eval()


def stock(name="olmoe"):
    return copy.deepcopy(_stock(name))


def converted(router="gemoe", name="olmoe", seed=1, **options):
    model = stock(name).train()
    torch.manual_seed(seed)
    return model, convert(model, router, **options)


def batch(seed=0, labels=True):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 80, (2, 7), generator=g)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    ids = ids.masked_fill(mask == 0, 0)
    both = {"input_ids": ids, "attention_mask": mask}
    return both | ({"labels": ids.masked_fill(mask == 0, -100)} if labels else {})
