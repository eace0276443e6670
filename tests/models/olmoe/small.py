"""OLMoE small: a folder in its public layout, and its logits."""

from __future__ import annotations

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from gemoe_ds.models.inputs import ModelInputs
from tests.tiny import WORDS

LAYERS, HEADS, TOP_K, EPS = 2, 4, 3, 1e-5


def write_olmoe(folder, vocabulary=WORDS, std=0.3, **options):
    """As `save_pretrained` leaves it: three matrices an expert, several shards, random norms."""
    sizes = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "num_experts": 8,
        "num_experts_per_tok": TOP_K,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = OlmoeConfig(**sizes | options)
    torch.manual_seed(0)
    model = OlmoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, std)
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


def logits_of(model, ids_BS, valid_BS=None):
    valid_BS = torch.ones_like(ids_BS, dtype=torch.bool) if valid_BS is None else valid_BS
    with torch.no_grad():
        hidden = model.eval().hidden(ModelInputs(ids_BS, valid_BS, torch.zeros_like(valid_BS)))
        return model.backbone.head(model.hf)(hidden)
