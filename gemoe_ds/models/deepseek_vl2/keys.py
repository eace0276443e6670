"""How the public folder of DeepSeek-VL2-Tiny names what the model here consists of."""

from __future__ import annotations

from gemoe_ds.hf_io.key_rules import KeyMap, Rule, expert_tables, fused_qkv

_VIT_BLOCK, _VIT_LAYER = "vision.blocks.{l}.", "vision_tower.encoder.layers.{l}."
_VISION = (
    Rule("vision.patch_embed.proj.{*}", "vision_tower.embeddings.patch_embedding.{*}"),
    Rule(
        "vision.pos_embed",
        "vision_tower.embeddings.position_embedding.weight",
        rearrange="1 n d -> n d",
    ),
    Rule("vision.norm.{*}", "vision_tower.post_layernorm.{*}"),
    *fused_qkv(f"{_VIT_BLOCK}attn.qkv.{{*}}", f"{_VIT_LAYER}self_attn.{{name}}.{{*}}"),
    *(
        Rule(f"{_VIT_BLOCK}{stored}.{{*}}", f"{_VIT_LAYER}{ours}.{{*}}")
        for stored, ours in (
            ("attn.proj", "self_attn.out_proj"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
            ("norm1", "layer_norm1"),
            ("norm2", "layer_norm2"),
        )
    ),
)
KEYS = KeyMap(
    (
        *_VISION,
        Rule("projector.layers.{*}", "projector.{*}"),
        Rule("language.lm_head.weight", "lm_head.weight"),
        Rule("language.model.{*}", "language_model.{*}"),
    ),
    unused=("vision.attn_pool.*",),
    experts=expert_tables(
        "language.model.layers.{l}.mlp.experts", "language_model.layers.{l}.mlp.experts"
    ),
)
