"""DeepSeek-VL2-Tiny: 11 of 12 layers with 64 experts, top-6, and two shared ones; SigLIP-384."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import nn
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextMoe

from gemoe_ds.hf_io.hf_config import meta_model
from gemoe_ds.hf_io.key_rules import Shape
from gemoe_ds.models.backbone import HFModel
from gemoe_ds.models.blocks import deepseek_block
from gemoe_ds.models.chat import ChatTemplate
from gemoe_ds.models.deepseek_vl2.images import DeepseekVl2Images
from gemoe_ds.models.deepseek_vl2.keys import KEYS
from gemoe_ds.models.deepseek_vl2.model import PATCH, DeepseekVl2Config, DeepseekVl2Model
from gemoe_ds.models.own_model import OwnModelBackbone

# timm's attention pooling, a head that the model ignores
_UNUSED: dict[str, Shape] = {"vision.attn_pool.latent": (1, 1, 1152)}
for _name, _high, _wide in (
    ("q", 1152, 1152),
    ("kv", 2304, 1152),
    ("proj", 1152, 1152),
    ("norm", 1152, None),
    ("mlp.fc1", 4304, 1152),
    ("mlp.fc2", 1152, 4304),
):
    _UNUSED[f"vision.attn_pool.{_name}.weight"] = (_high, _wide) if _wide else (_high,)
    _UNUSED[f"vision.attn_pool.{_name}.bias"] = (_high,)


_GROUNDING = ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>")


class DeepseekVl2Backbone(OwnModelBackbone):
    """From a folder in the public layout."""

    name: ClassVar[str] = "deepseek_vl2"
    block_adapters = {DeepseekOcr2TextMoe: deepseek_block}
    published_parameters: ClassVar[int] = 3_370_501_440
    published_tensors: ClassVar[int] = 2582
    published_unused = _UNUSED
    keys = KEYS
    chat = ChatTemplate(
        question="<|User|>: {text}\n\n<|Assistant|>:",
        question_with_image="<|User|>: {image}\n{text}\n\n<|Assistant|>:",
        answer="{text}{end}{eos}",
        system="{bos}{text}",
        between_images="\n",
        bos_before_text=True,  # LlamaTokenizerFast of transformers 4; version 5 has forgotten it
        no_question="<|User|>:<|Assistant|>:",
        only_image="<|User|>: {image}\n\n<|Assistant|>:",
        specials=("<|User|>", "<|Assistant|>"),
        obeyed=_GROUNDING,
        stripped=True,
        pad="<｜▁pad▁｜>",
        added={
            token: 128815 + place
            for place, token in enumerate(("<image>", *_GROUNDING, "<|User|>", "<|Assistant|>"))
        },
    )

    def load(self, checkpoint: Path | None, tokenizer_dir: Path) -> nn.Module:
        return self.described(DeepseekVl2Model, DeepseekVl2Config, checkpoint)

    @classmethod
    def published(cls) -> nn.Module:
        """DeepSeek-VL2-Tiny."""
        return meta_model(DeepseekVl2Model, DeepseekVl2Config())

    def image_layout(self, model: HFModel) -> DeepseekVl2Images:
        config: DeepseekVl2Config = model.config
        patches = config.image_size // PATCH
        return DeepseekVl2Images(tile=config.image_size, side=-(-patches // 2))
