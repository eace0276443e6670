"""How the public folder of MolmoE-1B names what the model here consists of."""

from __future__ import annotations

from gemoe_ds.hf_io.key_rules import KeyMap, Rule, expert_tables, fused_qkv

PATCH = 14  # pixels, of this tower at any size
_LAYER = "language_model.model.layers.{l}."
_BLOCK = "model.transformer.blocks.{l}."
_SEEN = "model.vision_backbone."
_VIT_BLOCK = f"{_SEEN}image_vit.transformer.resblocks.{{l}}."
_VIT_LAYER = "vision_tower.encoder.layers.{l}."

_LANGUAGE = (
    Rule("model.transformer.wte.embedding", "language_model.model.embed_tokens.weight"),
    Rule("model.transformer.ln_f.weight", "language_model.model.norm.weight"),
    Rule("lm_head.weight", "language_model.lm_head.weight"),
    *fused_qkv(f"{_BLOCK}attn.att_proj.weight", f"{_LAYER}self_attn.{{name}}.weight"),
    Rule(f"{_BLOCK}attn.attn_out.weight", f"{_LAYER}self_attn.o_proj.weight"),
    Rule(f"{_BLOCK}attn.q_norm.weight", f"{_LAYER}self_attn.q_norm.weight"),
    Rule(f"{_BLOCK}attn.k_norm.weight", f"{_LAYER}self_attn.k_norm.weight"),
    Rule(f"{_BLOCK}attn.attn_norm.weight", f"{_LAYER}input_layernorm.weight"),
    Rule(f"{_BLOCK}mlp.ff_norm.weight", f"{_LAYER}post_attention_layernorm.weight"),
    Rule(f"{_BLOCK}mlp.gate.weight", f"{_LAYER}mlp.gate.weight"),
)
_VISION = (
    Rule(f"{_SEEN}pad_embed", "pad_embed"),
    Rule(f"{_SEEN}image_vit.class_embedding", "vision_tower.embeddings.class_embedding"),
    Rule(
        f"{_SEEN}image_vit.positional_embedding",
        "vision_tower.embeddings.position_embedding.weight",
    ),
    Rule(
        f"{_SEEN}image_vit.patch_embedding.weight",
        "vision_tower.embeddings.patch_embedding.weight",
        rearrange="d (y x c) -> d c y x",
        sizes={"y": PATCH, "x": PATCH},
    ),
    Rule(f"{_SEEN}image_vit.pre_ln.{{*}}", "vision_tower.pre_layrnorm.{*}"),
    *(
        Rule(f"{_VIT_BLOCK}{stored}.{{*}}", f"{_VIT_LAYER}{ours}.{{*}}")
        for stored, ours in (
            ("attention.wq", "self_attn.q_proj"),
            ("attention.wk", "self_attn.k_proj"),
            ("attention.wv", "self_attn.v_proj"),
            ("attention.wo", "self_attn.out_proj"),
            ("feed_forward.w1", "mlp.fc1"),
            ("feed_forward.w2", "mlp.fc2"),
            ("attention_norm", "layer_norm1"),
            ("ffn_norm", "layer_norm2"),
        )
    ),
    Rule(f"{_SEEN}image_pooling_2d.{{*}}", "pooling.{*}"),
    Rule(f"{_SEEN}image_projector.{{*}}", "projector.{*}"),
)
KEYS = KeyMap(
    (*_LANGUAGE, *_VISION),
    # rows that no token asks for, and a layer
    unused=("*.wte.new_embedding", "*.image_vit.transformer.resblocks.22.*"),
    experts=expert_tables(f"{_BLOCK}mlp.experts", f"{_LAYER}mlp.experts"),
)
