"""What every LLaVA of transformers has in common, whatever its language model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from gemoe_ds.hf_io.key_rules import KeyMap, Rule
from gemoe_ds.models.backbone import Backbone, HFModel
from gemoe_ds.models.images import SquareImages
from gemoe_ds.models.inputs import ModelInputs, run_text


class LlavaBackbone(Backbone):
    """Reading, images, forward and head; where the MoE blocks are is for subclasses to say."""

    keys = KeyMap(
        (
            Rule("language_model.model.{*}", "model.language_model.{*}"),
            Rule("language_model.lm_head.{*}", "lm_head.{*}"),
            Rule("{*}", "model.{*}"),
        )
    )

    def meta_model(
        self, folder: Path, model_class: type = LlavaForConditionalGeneration
    ) -> HFModel:
        """The model that a folder describes; CheckpointError if it describes none of ours."""
        return self.described(model_class, LlavaConfig, folder)

    def image_layout(self, model: HFModel) -> SquareImages:
        vision = model.config.vision_config
        tokens = (vision.image_size // vision.patch_size) ** 2
        return SquareImages(vision.image_size, tokens, model.config.image_token_id)

    def hidden(self, model: HFModel, inputs: ModelInputs) -> Tensor:
        return run_text(
            model.model, inputs, lambda images: self._image_features(model, images["pixels"])
        )

    @staticmethod
    def _image_features(model: HFModel, pixels_NCHW: Tensor) -> Tensor:
        features = model.model.get_image_features(pixels_NCHW, return_dict=True).pooler_output
        return torch.cat(features).to(pixels_NCHW.dtype)

    def head(self, model: HFModel) -> nn.Module:
        return model.lm_head
