"""What every LLaVA of transformers has in common, whatever its language model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from gemoe_ds.hf_io.key_rules import KeyMap, Rule
from gemoe_ds.models.backbone import Backbone, HFModel
from gemoe_ds.models.images import SquareImages, put_features
from gemoe_ds.models.inputs import ModelInputs
from gemoe_ds.models.kv_cache import attention_inputs


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
        # The merge is ours, not Llava's: a rank without images runs the same modules as the others,
        # on a dummy one, because ZeRO gathers and reduces module by module on all ranks.
        embedded_BSD = model.get_input_embeddings()(inputs.input_ids_BS)
        if inputs.images:
            features = self._image_features(model, inputs.images["pixels"].to(embedded_BSD.dtype))
            embedded_BSD = put_features(embedded_BSD, features, inputs.images["feature_BS"])
        output = model.model(
            inputs_embeds=embedded_BSD, **attention_inputs(inputs.is_valid_BS, inputs.past)
        )
        return output.last_hidden_state

    @staticmethod
    def _image_features(model: HFModel, pixels_NCHW: Tensor) -> Tensor:
        features = model.model.get_image_features(pixels_NCHW, return_dict=True).pooler_output
        return torch.cat(features).to(pixels_NCHW.dtype)

    def head(self, model: HFModel) -> nn.Module:
        return model.lm_head
