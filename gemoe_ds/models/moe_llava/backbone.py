"""MoE-LLaVA-StableLM-1.6B-4e and -Qwen-1.8B-4e: 4 experts, top-2, in every other layer.

MoE-LLaVA (arXiv 2401.15947) draws the second expert with noise, in evaluation too, and drops what
exceeds a capacity; here the second best is taken and nothing is dropped. Its Phi-2 variant is not
here: its FFNs have one projection and biases, our experts are SwiGLU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn
from transformers import CLIPVisionModel

from gemoe_ds.errors import CheckpointError, ConfigError
from gemoe_ds.hf_io.hf_config import meta_model
from gemoe_ds.hf_io.key_rules import KeyMap, Rule, expert_tables, fused_qkv
from gemoe_ds.hf_io.quiet import without_report
from gemoe_ds.hf_io.safetensors_reader import open_stored
from gemoe_ds.models.backbone import Backbone, HFModel
from gemoe_ds.models.chat import ChatTemplate
from gemoe_ds.models.inputs import ModelInputs, run_text
from gemoe_ds.models.moe_llava.images import PaddedSquare
from gemoe_ds.models.moe_llava.model import (
    MoeLlavaConfig,
    MoeLlavaModel,
    MoeLlavaQwenConfig,
    MoeLlavaStableLmConfig,
)
from gemoe_ds.models.upcycled.backbone import UPCYCLED_BLOCKS
from gemoe_ds.registry import ConfigModel, Reads

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


class MoeLlavaBackbone(Backbone):
    """What the family has in common; `config_class` and `keys` are the language model's."""

    config_class: ClassVar[type[MoeLlavaConfig]]
    block_adapters = UPCYCLED_BLOCKS
    published_part = "language_model."  # without tower and projector
    may_lack = ("vision_tower.*",)
    chat = ChatTemplate(
        start="A chat between a curious user and an artificial intelligence assistant. The "
        "assistant gives helpful, detailed, and polite answers to the user's questions. ",
        system="{text} ",
        question="USER: {text} ASSISTANT:",
        question_with_image="USER: {image}\n{text} ASSISTANT:",
        answer=" {text}{end}<|endoftext|>",
        no_question="USER:ASSISTANT:",
        specials=("<|endoftext|>",),
        joined=True,
    )

    class Config(ConfigModel):
        vision_tower: Annotated[str | None, Reads(of_hub="model")] = Field(
            None,
            description="CLIP ViT-L/14-336 (a folder, or openai/clip-vit-large-patch14-336), for a "
            "checkpoint without its tower",
        )

    config: Config

    def load(self, checkpoint: Path | None, tokenizer_dir: Path) -> nn.Module:
        model = self.described(MoeLlavaModel, self.config_class, checkpoint)
        assert checkpoint is not None
        if not any("image_tower." in key for key in open_stored(checkpoint)):
            model.vision_tower = self._tower(model, checkpoint)
        return model

    @classmethod
    def published(cls) -> nn.Module:
        return meta_model(MoeLlavaModel, cls.config_class.published())

    def _tower(self, model: HFModel, checkpoint: Path) -> nn.Module:
        if self.config.vision_tower is None:
            raise ConfigError(
                f"model.backbone.vision_tower: {checkpoint} has no image tower; give the folder "
                "of openai/clip-vit-large-patch14-336"
            )
        folder = Path(self.config.vision_tower)
        try:
            with without_report():  # of a whole CLIP: its text tower is not used
                loaded: Any = CLIPVisionModel.from_pretrained(  # typed without its report
                    folder, output_loading_info=True, trust_remote_code=False
                )
        except Exception as error:  # any error in reading: the folder is at fault
            raise CheckpointError(f"model.backbone.vision_tower={folder}: {error}") from error
        tower, report = loaded
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise CheckpointError(
                f"model.backbone.vision_tower={folder}: missing: {missing[0]} ({len(missing)} keys)"
            )
        wanted, found = (
            {name: tuple(p.shape) for name, p in of.named_parameters()}
            for of in (model.vision_tower, tower)
        )
        if wanted != found:
            raise CheckpointError(
                f"model.backbone.vision_tower={folder}: not of the shapes that {checkpoint} has"
            )
        return tower

    def image_layout(self, model: HFModel) -> PaddedSquare:
        return PaddedSquare(model.config.vision.image_size)

    def hidden(self, model: HFModel, inputs: ModelInputs) -> Tensor:
        return run_text(
            model.language_model.model,
            inputs,
            lambda images: model.image_features(images["pixels"]),
        )

    def head(self, model: HFModel) -> nn.Module:
        return model.language_model.lm_head


class MoeLlavaStableLmBackbone(MoeLlavaBackbone):
    """From a folder in the public layout."""

    name: ClassVar[str] = "moe_llava_stablelm"
    config_class = MoeLlavaStableLmConfig
    published_parameters: ClassVar[int] = 2_890_321_920
    keys = KeyMap(
        (
            Rule("model.layers.{l}.mlp.deepspeed_moe.gate.wg.weight", f"{_LAYER}mlp.gate.weight"),
            *_seen("model"),
            Rule("{*}", "language_model.{*}"),
        ),
        unused=_UNUSED,
        experts=expert_tables(f"model.layers.{{l}}.{_EXPERTS}", f"{_LAYER}mlp.experts"),
    )


class MoeLlavaQwenBackbone(MoeLlavaBackbone):
    """From a folder in the public layout: Qwen's names, w2 is the gate and w1 is up."""

    name: ClassVar[str] = "moe_llava_qwen"
    config_class = MoeLlavaQwenConfig
    published_parameters: ClassVar[int] = 3_054_323_712
    keys = KeyMap(
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
