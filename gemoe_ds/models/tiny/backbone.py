"""The demo's backbone: LLaVA with OLMoE as its language model, from stock transformers, made small.

Nothing in its MoE path is special to the demo: the blocks are `OlmoeSparseMoeBlock`s, 64 experts,
top-8, weights not renormalised, as in OLMoE-1B-7B.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OlmoeConfig,
    PreTrainedTokenizerBase,
)

from gemoe_ds.errors import CheckpointError, ConfigError
from gemoe_ds.hf_io.key_rules import KeyMap, expert_tables
from gemoe_ds.hf_io.quiet import without_bars
from gemoe_ds.models.backbone import HFModel
from gemoe_ds.models.llava import LlavaBackbone
from gemoe_ds.models.olmoe.backbone import OLMOE_BLOCKS
from gemoe_ds.models.tiny.vision import vision_config
from gemoe_ds.models.tokenizer import load_tokenizer
from gemoe_ds.registry import ConfigModel, Reads


class TinyBackbone(LlavaBackbone):
    """ViT + two-layer projector + OLMoE. Options shape a fresh model; a checkpoint has its own."""

    name: ClassVar[str] = "tiny"
    block_adapters = OLMOE_BLOCKS
    keys = KeyMap(
        LlavaBackbone.keys.rules,
        experts=expert_tables(
            "language_model.model.layers.{l}.mlp.experts",
            "model.language_model.layers.{l}.mlp.experts",
        ),
    )

    class Config(ConfigModel):
        hidden_size: int = Field(64, ge=8, description="width D of the language model")
        num_layers: int = Field(4, ge=1, description="decoder layers, every one with an MoE block")
        num_heads: int = Field(4, ge=1)
        num_experts: int = Field(64, ge=1)
        top_k: int = Field(8, ge=1, description="experts a token in pretraining")
        expert_width: int = Field(16, ge=8, description="F of each expert")
        image_size: int = Field(64, ge=8)
        patch_size: int = Field(16, ge=1)
        vision_width: int = Field(64, ge=8)
        vision_layers: int = Field(2, ge=1)
        vision_checkpoint: Annotated[str | None, Reads()] = Field(
            None,
            description="a pretrained CLIP vision tower for a fresh model; null: random",
        )
        max_position: int = Field(2048, ge=1)

    config: Config

    def load(self, checkpoint: Path | None, tokenizer_dir: Path) -> nn.Module:
        if checkpoint is not None:
            return self._from_checkpoint(checkpoint)
        tokenizer = load_tokenizer(tokenizer_dir, self.chat)
        model = LlavaForConditionalGeneration(self._fresh_config(tokenizer)).float()
        self._scale_initial_weights(model)
        if self.config.vision_checkpoint:
            with without_bars():
                tower = CLIPVisionModel.from_pretrained(
                    self.config.vision_checkpoint, trust_remote_code=False
                )
            model.model.vision_tower.load_state_dict(tower.state_dict())
        return model

    def vision_config(self) -> CLIPVisionConfig:
        """The shape of the vision tower of a fresh model."""
        config = self.config
        return vision_config(
            config.image_size, config.patch_size, config.vision_width, config.vision_layers
        )

    @torch.no_grad()
    def _scale_initial_weights(self, model: HFModel) -> None:
        """Signals of unit variance, and experts that are heard from the start.

        Scores are not renormalised: over 64 experts each weighs about 1/64 at first, and with the
        usual initial std of 0.02 the MoE blocks would add nothing for thousands of steps.
        """
        for name, weight in model.model.named_parameters():
            skipped = "vision_tower" in name or "embed_tokens" in name
            if weight.dim() >= 2 and not skipped:
                gain = 2.0 if name.endswith("experts.down_proj") else 1.0
                weight.normal_(0, gain * weight.shape[-1] ** -0.5)

    def _fresh_config(self, tokenizer: PreTrainedTokenizerBase) -> LlavaConfig:
        config = self.config
        text = OlmoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.expert_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            num_experts=config.num_experts,
            num_experts_per_tok=config.top_k,
            norm_topk_prob=False,
            max_position_embeddings=config.max_position,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        image_token: Any = tokenizer.convert_tokens_to_ids("<image>")
        return LlavaConfig(
            vision_config=self.vision_config(),
            text_config=text,
            image_token_index=image_token,
            vision_feature_layer=-1,
            image_seq_length=(config.image_size // config.patch_size) ** 2,
        )

    def _from_checkpoint(self, folder: Path) -> nn.Module:
        model = self.meta_model(folder)
        if not isinstance(model.config.text_config, OlmoeConfig):
            raise CheckpointError(
                f"model.checkpoint={folder}: its language model is of model_type "
                f"{model.config.text_config.model_type!r}, `{self.name}` has 'olmoe'"
            )
        self._refuse_contradictions(model.config, folder)
        return model

    def _refuse_contradictions(self, stored: LlavaConfig, folder: Path) -> None:
        text: Any = stored.text_config
        vision: Any = stored.vision_config
        shapes = {
            "hidden_size": text.hidden_size,
            "num_layers": text.num_hidden_layers,
            "num_heads": text.num_attention_heads,
            "num_experts": text.num_experts,
            "top_k": text.num_experts_per_tok,
            "expert_width": text.intermediate_size,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "vision_width": vision.hidden_size,
            "vision_layers": vision.num_hidden_layers,
        }
        for field in self.config.model_fields_set & shapes.keys():
            if getattr(self.config, field) != shapes[field]:
                raise ConfigError(
                    f"model.backbone.{field}={getattr(self.config, field)}, but {folder} has "
                    f"{shapes[field]}; leave shapes out of a recipe that names a checkpoint"
                )
