"""Qwen3-VL-30B-A3B: 48 layers of 128 experts, top-8, scores renormalised; DeepStack; M-RoPE.

Everything is transformers' own; only the merge of image features is ours, so that a rank without
images runs the same modules as the others. The public folder holds experts fused and transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock

from gemoe_ds.errors import CheckpointError
from gemoe_ds.hf_io.hf_config import meta_model
from gemoe_ds.hf_io.key_rules import KeyMap, expert_tables
from gemoe_ds.models.backbone import Backbone, HFModel
from gemoe_ds.models.blocks import stock_block
from gemoe_ds.models.chat import ChatTemplate
from gemoe_ds.models.images import put_rows
from gemoe_ds.models.inputs import ModelInputs
from gemoe_ds.models.kv_cache import attended, attention_inputs
from gemoe_ds.models.qwen3_vl.images import Qwen3VLImages, rotary_positions
from gemoe_ds.registry import ConfigModel

_EXPERTS = "model.language_model.layers.{l}.mlp.experts"


class Qwen3VLBackbone(Backbone):
    """`Qwen3VLMoeForConditionalGeneration` of transformers, from a folder; images, no videos."""

    name: ClassVar[str] = "qwen3_vl_moe"
    # transformers renormalises whatever the configuration says
    block_adapters = {Qwen3VLMoeTextSparseMoeBlock: partial(stock_block, norm_topk_prob=True)}
    published_parameters: ClassVar[int] = 31_070_754_032
    published_processor: ClassVar[Mapping[str, Any]] = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }

    class Config(ConfigModel):
        min_pixels: int | None = Field(
            None, ge=1, description="smaller images are enlarged; null: the checkpoint's value"
        )
        max_pixels: int | None = Field(
            None,
            ge=1024,
            description="larger images are shrunk (1,024 pixels: a token); null: the checkpoint's",
        )

    config: Config
    keys = KeyMap(experts=expert_tables(_EXPERTS, _EXPERTS, published="transposed"))
    chat = ChatTemplate(
        question="<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
        question_with_image="<|im_start|>user\n{image}{text}<|im_end|>\n<|im_start|>assistant\n",
        answer="{text}{end}<|im_end|>\n",
        start="",
        document="{text}{end}<|endoftext|>",  # Qwen's own documents have no bos
        system="<|im_start|>system\n{text}<|im_end|>\n",
        specials=("<|im_start|>", "<|im_end|>"),
        stops=("<|endoftext|>",),
        obeyed=tuple(
            f"<|{name}_{side}|>"
            for name in ("object_ref", "box", "quad")
            for side in ("start", "end")
        ),
        joined=True,
    )

    def load(self, checkpoint: Path | None, tokenizer_dir: Path) -> nn.Module:
        model = self.described(Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeConfig, checkpoint)
        assert checkpoint is not None
        self.processor = self._processor(checkpoint)
        return model

    @classmethod
    def published(cls) -> nn.Module:
        """Qwen3-VL-30B-A3B-Instruct; its shape, for rotary settings come from a folder."""
        config = Qwen3VLMoeConfig(
            text_config={
                "vocab_size": 151936,
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "moe_intermediate_size": 768,
                "num_hidden_layers": 48,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "tie_word_embeddings": False,
            },
            vision_config={
                "depth": 27,
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_heads": 16,
                "patch_size": 16,
                "spatial_merge_size": 2,
                "num_position_embeddings": 2304,
                "out_hidden_size": 2048,
                "deepstack_visual_indexes": [8, 16, 24],
            },
            tie_word_embeddings=False,
        )
        return meta_model(Qwen3VLMoeForConditionalGeneration, config)

    @cached_property
    def processor(self) -> Qwen2VLImageProcessorPil:
        """Of the public model, until a folder is loaded."""
        return Qwen2VLImageProcessorPil(**self.published_processor)

    def _processor(self, folder: Path) -> Qwen2VLImageProcessorPil:
        try:
            processor = Qwen2VLImageProcessorPil.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # of any kind, from a file that is missing or damaged
            raise CheckpointError(
                f"model.checkpoint={folder}: preprocessor_config.json or processor_config.json: "
                f"{error}; without the model's own file images would be cut into patches of "
                "another size"
            ) from error
        size, wanted = processor.size, self.config
        processor.size = {
            "shortest_edge": wanted.min_pixels or size["shortest_edge"],  # pixels, not edges
            "longest_edge": wanted.max_pixels or size["longest_edge"],
        }
        return processor

    def image_layout(self, model: HFModel) -> Qwen3VLImages:
        config: Any = model.config
        return Qwen3VLImages(
            self.processor,
            image_id=config.image_token_id,
            start_id=config.vision_start_token_id,
            end_id=config.vision_end_token_id,
            position_side=model.model.visual.num_grid_per_side,
        )

    def hidden(self, model: HFModel, inputs: ModelInputs) -> Tensor:
        inner: Any = model.model
        embedded_BSD = inner.get_input_embeddings()(inputs.input_ids_BS)
        if not inputs.images:
            hidden_BSD: Tensor = inner.language_model(
                inputs_embeds=embedded_BSD,
                **attention_inputs(inputs.is_valid_BS, inputs.past, document_BS=inputs.document_BS),
            ).last_hidden_state
            return hidden_BSD
        images = inputs.images
        feature_BS, tower = images["feature_BS"], inner.visual
        is_image_BS = feature_BS >= 0
        seen = tower(
            images["pixels"].to(embedded_BSD.dtype).type(tower.dtype),
            grid_thw=images["grid_thw"],
            interp_indices=images["interp_indices"],
            interp_weights=images["interp_weights"],
            position_ids=images["patch_position"],
            return_dict=True,
        )
        rows_P = feature_BS[is_image_BS]
        embedded_BSD = put_rows(embedded_BSD, seen.pooler_output[rows_P], is_image_BS)
        attended_BS = attended(inputs.is_valid_BS)
        position_3BS = rotary_positions(feature_BS, attended_BS, images["place_F3"])
        hidden_BSD = inner.language_model(
            inputs_embeds=embedded_BSD,
            visual_pos_masks=is_image_BS,
            deepstack_visual_embeds=[
                rows.index_select(0, rows_P) for rows in seen.deepstack_features
            ],
            **attention_inputs(
                inputs.is_valid_BS, inputs.past, position_3BS, document_BS=inputs.document_BS
            ),
        ).last_hidden_state
        return hidden_BSD

    def head(self, model: HFModel) -> nn.Module:
        return model.lm_head
