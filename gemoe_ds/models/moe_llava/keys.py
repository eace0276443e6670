"""How the public folders of MoE-LLaVA name what the models here consist of."""

from __future__ import annotations

from gemoe_ds.hf_io.key_rules import KeyMap, Rule, expert_tables, fused_qkv

_TOWER = "model.image_tower.image_tower."
_LAYER = "language_model.model.layers.{l}."
_QWEN = "transformer.h.{l}."
_EXPERTS = "mlp.deepspeed_moe.experts.deepspeed_experts"
_UNUSED = ("*.rotary_emb.inv_freq", "*.embeddings.position_ids")


def _seen(prefix: str) -> tuple[Rule, ...]:
    """Projector and tower, under `model.` or, with Qwen, `transformer.`"""
    tower = _TOWER.replace("model.", f"{prefix}.", 1)
    return (
        Rule(f"{prefix}.mm_projector.image_spatial_proj.{{*}}", "projector.{*}"),
        Rule(f"{tower}vision_model.{{*}}", "vision_tower.{*}"),
    )


STABLELM_KEYS = KeyMap(
    (
        Rule("model.layers.{l}.mlp.deepspeed_moe.gate.wg.weight", f"{_LAYER}mlp.gate.weight"),
        *_seen("model"),
        Rule("{*}", "language_model.{*}"),
    ),
    unused=_UNUSED,
    experts=expert_tables(f"model.layers.{{l}}.{_EXPERTS}", f"{_LAYER}mlp.experts"),
)
QWEN_KEYS = KeyMap(
    (
        Rule("transformer.wte.weight", "language_model.model.embed_tokens.weight"),
        Rule("transformer.ln_f.weight", "language_model.model.norm.weight"),
        Rule("lm_head.weight", "language_model.lm_head.weight"),
        Rule(f"{_QWEN}ln_1.weight", f"{_LAYER}input_layernorm.weight"),
        Rule(f"{_QWEN}ln_2.weight", f"{_LAYER}post_attention_layernorm.weight"),
        *fused_qkv(f"{_QWEN}attn.c_attn.{{*}}", f"{_LAYER}self_attn.{{name}}.{{*}}"),
        Rule(f"{_QWEN}attn.c_proj.weight", f"{_LAYER}self_attn.o_proj.weight"),
        Rule(f"{_QWEN}mlp.deepspeed_moe.gate.wg.weight", f"{_LAYER}mlp.gate.weight"),
        Rule(f"{_QWEN}mlp.w2.weight", f"{_LAYER}mlp.gate_proj.weight"),
        Rule(f"{_QWEN}mlp.w1.weight", f"{_LAYER}mlp.up_proj.weight"),
        Rule(f"{_QWEN}mlp.c_proj.weight", f"{_LAYER}mlp.down_proj.weight"),
        *_seen("transformer"),
    ),
    unused=_UNUSED,
    experts=expert_tables(
        f"{_QWEN}{_EXPERTS}", f"{_LAYER}mlp.experts", matrices=("w2", "w1", "c_proj")
    ),
)
