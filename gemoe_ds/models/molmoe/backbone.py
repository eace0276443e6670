"""MolmoE-1B (allenai/MolmoE-1B-0924): OLMoE-1B-7B that sees through CLIP; 64 experts, top-8."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from gemoe_ds.hf_io.hf_config import meta_model
from gemoe_ds.hf_io.key_rules import KeyMap, Rule, Shape, expert_tables, fused_qkv
from gemoe_ds.models.backbone import Backbone, HFModel
from gemoe_ds.models.chat import ChatTemplate
from gemoe_ds.models.images import add_features
from gemoe_ds.models.inputs import ModelInputs, run_text
from gemoe_ds.models.molmoe.images import MolmoeImages
from gemoe_ds.models.molmoe.model import MolmoeConfig, MolmoeModel
from gemoe_ds.models.olmoe.backbone import OLMOE_BLOCKS
from gemoe_ds.registry import ConfigModel

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
_ABOVE = f"{_SEEN}image_vit.transformer.resblocks.22."  # above the last layer that is used
_UNUSED: dict[str, Shape] = {"model.transformer.wte.new_embedding": (128, 2048)}
for _name, _high, _wide in (
    *((f"attention.w{n}", 1024, 1024) for n in "qkvo"),
    ("feed_forward.w1", 4096, 1024),
    ("feed_forward.w2", 1024, 4096),
    ("attention_norm", 1024, None),
    ("ffn_norm", 1024, None),
):
    _UNUSED[f"{_ABOVE}{_name}.weight"] = (_high, _wide) if _wide else (_high,)
    _UNUSED[f"{_ABOVE}{_name}.bias"] = (_high,)


class MolmoeBackbone(Backbone):
    """From a folder in the public layout."""

    name: ClassVar[str] = "molmoe"
    block_adapters = OLMOE_BLOCKS
    published_parameters: ClassVar[int] = 7_221_875_712
    published_unused = _UNUSED
    keys = KeyMap(
        (*_LANGUAGE, *_VISION),
        # rows that no token asks for, and a layer
        unused=("*.wte.new_embedding", "*.image_vit.transformer.resblocks.22.*"),
        experts=expert_tables(f"{_BLOCK}mlp.experts", f"{_LAYER}mlp.experts"),
    )
    chat = ChatTemplate(
        question=" User: {text} Assistant:",
        question_with_image="{image} User: {text} Assistant:",
        answer=" {text}{end}<|endoftext|>",
        # the published code would put the features of every image at the places of the first
        one_image=True,
        start="<|endoftext|>",
        specials=("<|endoftext|>", "<im_start>", "<im_end>", "<im_patch>", "<im_col>"),
        added={
            "<im_start>": 50280,
            "<im_end>": 50281,
            "<im_patch>": 50282,
            "<im_col>": 50283,
            "<|image|>": 50284,
        },
    )

    class Config(ConfigModel):
        max_crops: int = Field(
            12,
            ge=1,
            le=64,
            description="crops of an image beside the global one; Molmo trains with 12, and "
            "evaluates with 36",
        )

    config: Config

    def load(self, checkpoint: Path | None, tokenizer_dir: Path) -> nn.Module:
        return self.described(MolmoeModel, MolmoeConfig, checkpoint)

    @classmethod
    def published(cls) -> nn.Module:
        """MolmoE-1B-0924."""
        return meta_model(MolmoeModel, MolmoeConfig())

    def image_layout(self, model: HFModel) -> MolmoeImages:
        config: MolmoeConfig = model.config
        crops = self.config.max_crops
        return MolmoeImages(patch=PATCH, crop=config.image_size // PATCH, max_crops=crops)

    def hidden(self, model: HFModel, inputs: ModelInputs) -> Tensor:
        return run_text(
            model.language_model.model,
            inputs,
            lambda images: model.image_features(images["pixels"], images["mask"]),
            put=add_features,
        )

    def head(self, model: HFModel) -> nn.Module:
        return model.language_model.lm_head
