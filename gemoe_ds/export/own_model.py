"""A model that transformers has no class for, as one of its classes: for the exported folder.

Shapes: B sequences, S tokens of this forward, P tokens of forwards before, F image features, D
model, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from gemoe_ds.export.image_rows import aligned
from gemoe_ds.export.own_config import OwnConfig
from gemoe_ds.export.settings import NOT_SAVED, local_folder
from gemoe_ds.export.stored_parameters import stored_parameters, usual_dtype
from gemoe_ds.models.deepseek_vl2.keys import KEYS
from gemoe_ds.models.deepseek_vl2.model import DeepseekVl2Model as Model

PICTURES = ("pixel_values", "image_tiles", "image_mask")  # of all sequences, joined
_FILES = ("*.json", "*.safetensors")
_INNER = "model"


class OwnModel(PreTrainedModel, GenerationMixin):
    """The static model: what the base is. Published key names are mapped while it loads.

    `image_rows` [B, S] says which row of all image features a position takes; -1: none, -2: none,
    but the token is of an image. The folder's processor makes it.
    """

    config_class = OwnConfig
    base_model_prefix = _INNER
    blocks_below = f"{_INNER}."  # what stands before the paths of MoE blocks in config.json
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Model(config.described())
        for part in self.model.children():
            if isinstance(part, PreTrainedModel):
                part.set_attn_implementation(config._attn_implementation)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        folder = local_folder(pretrained_model_name_or_path, kwargs, _FILES)
        if not isinstance(config, PreTrainedConfig):
            config = OwnConfig.from_pretrained(folder)
        with torch.device("meta"):
            shapes = Model(config.described())
        found = stored_parameters(folder, KEYS, shapes, f"{_INNER}.")
        dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None) or "auto"
        kwargs.pop("dtype", None)
        if dtype == "auto":
            dtype = config.dtype or usual_dtype(found)
        loaded: Any = super().from_pretrained(
            None, *args, config=config, state_dict=found, dtype=dtype, **kwargs
        )
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.config.name_or_path = model.name_or_path = str(pretrained_model_name_or_path)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(NOT_SAVED)

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.model.text.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        pixel_values: Tensor | None = None,
        image_rows: Tensor | None = None,
        image_tiles: Tensor | None = None,
        image_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """As every causal language model of transformers; of pictures what the processor gives.

        Raises ValueError for pictures without `image_rows`.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            extras = {"tiles": image_tiles, "mask": image_mask}
            inputs_embeds = self._with_pictures(inputs_embeds, pixel_values, image_rows, extras)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            # counted from the first token that is no padding, as in training
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
            position_ids = position_ids[:, -inputs_embeds.shape[1] :]
        out = self.model.text(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1])
        found = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return found if wants_dict else found.to_tuple()

    def _with_pictures(
        self,
        embedded_BSD: Tensor,
        pixels: Tensor,
        rows_BP: Tensor | None,
        extras: dict[str, Tensor | None],
    ) -> Tensor:
        if rows_BP is None:
            raise ValueError(
                "pixel_values came without image_rows, which says where they belong; make both by "
                "AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)"
            )
        images = {name: tensor for name, tensor in extras.items() if tensor is not None}
        images["pixels"] = pixels.to(embedded_BSD.dtype)
        feature_BS = aligned(rows_BP, embedded_BSD.shape[1]).clamp(min=-1)
        return self.model.put(embedded_BSD, self.model.image_features(images), feature_BS)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Pictures are read once, with the prompt; without a cache in every step."""
        prepare: Any = GenerationMixin.prepare_inputs_for_generation
        inputs: dict[str, Any] = prepare(self, *args, **kwargs)
        past = inputs.get("past_key_values")
        is_first = kwargs.get("is_first_iteration", False)
        if past is not None and past.get_seq_length() > 0 and not is_first:
            for name in (*PICTURES, "image_rows"):
                inputs.pop(name, None)
        return inputs

    @staticmethod
    def _expand_inputs_for_generation(
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Any = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Several answers to a prompt share its pictures: `image_rows` points to them."""
        pictures = {n: model_kwargs.pop(n) for n in PICTURES if n in model_kwargs}
        input_ids, expanded = GenerationMixin._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, expanded | pictures
