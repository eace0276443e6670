"""What every LLaVA of transformers has in common, whatever its language model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from gemoe_ds.backbones.backbone import Backbone, ImageSpec
from gemoe_ds.backbones.keys import KeyMap, Rule
from gemoe_ds.backbones.weights import read_config, shell
from gemoe_ds.errors import CheckpointError


class LlavaBackbone(Backbone):
    """Reading, images, forward and head; where the MoE blocks are is for subclasses to say."""

    keys = KeyMap(
        (
            Rule("language_model.model.{*}", "model.language_model.{*}"),
            Rule("language_model.lm_head.{*}", "lm_head.{*}"),
            Rule("{*}", "model.{*}"),
        )
    )

    def shell(self, folder: Path, model_class: type = LlavaForConditionalGeneration) -> nn.Module:
        """The model that a folder describes; CheckpointError if it describes none of ours."""
        kind = read_config(folder).get("model_type")
        if kind != "llava":
            raise CheckpointError(
                f"model.checkpoint={folder} is of model_type {kind!r}, `{self.name}` is 'llava'"
            )
        try:
            return shell(model_class, LlavaConfig.from_pretrained(folder))
        except Exception as error:  # whatever the reader chokes on, the file is what is wrong
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise CheckpointError(f"model.checkpoint={folder}: config.json: {reason}") from error

    def image_spec(self, model: nn.Module) -> ImageSpec:
        vision = model.config.vision_config
        tokens = (vision.image_size // vision.patch_size) ** 2
        return ImageSpec(vision.image_size, tokens, model.config.image_token_id)

    def hidden(
        self, model: nn.Module, input_ids_BS: Tensor, is_valid_BS: Tensor, pixels_NCHW: Tensor
    ) -> Tensor:
        embedded_BSD = model.get_input_embeddings()(input_ids_BS)
        dtype = embedded_BSD.dtype
        if pixels_NCHW.shape[0]:
            features = self._image_features(model, pixels_NCHW.to(dtype))
            where = model.model.get_placeholder_mask(input_ids_BS, embedded_BSD, features)
            embedded_BSD = embedded_BSD.masked_scatter(where, features)
        elif model.training:
            # A rank without images runs the same modules in the same order as the others, on a
            # blank one that adds nothing: ZeRO reduces gradients, and ZeRO 3 gathers weights,
            # module by module on all ranks. For its sake the merge above is ours, not Llava's.
            size = model.config.vision_config.image_size
            blank = pixels_NCHW.new_zeros(1, 3, size, size, dtype=dtype)
            embedded_BSD = embedded_BSD + 0 * self._image_features(model, blank).sum()
        # Padding stands right of everything and attention is causal, so no valid token can see
        # it: without a mask, attention takes its fast causal path.
        output = model.model(inputs_embeds=embedded_BSD, use_cache=False, attention_mask=None)
        return output.last_hidden_state

    @staticmethod
    def _image_features(model: nn.Module, pixels_NCHW: Tensor) -> Tensor:
        features = model.model.get_image_features(pixels_NCHW, return_dict=True).pooler_output
        return torch.cat(features).to(pixels_NCHW.dtype)

    def head(self, model: nn.Module) -> nn.Module:
        return model.lm_head
