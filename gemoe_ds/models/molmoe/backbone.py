"""MolmoE-1B (allenai/MolmoE-1B-0924): OLMoE-1B-7B that sees through CLIP; 64 experts, top-8."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field
from torch import nn

from gemoe_ds.hf_io.hf_config import meta_model
from gemoe_ds.hf_io.key_rules import Shape
from gemoe_ds.models.backbone import HFModel
from gemoe_ds.models.chat import ChatTemplate
from gemoe_ds.models.molmoe.images import MolmoeImages
from gemoe_ds.models.molmoe.keys import KEYS, PATCH
from gemoe_ds.models.molmoe.model import MolmoeConfig, MolmoeModel
from gemoe_ds.models.olmoe.backbone import OLMOE_BLOCKS
from gemoe_ds.models.own_model import OwnModelBackbone
from gemoe_ds.registry import ConfigModel

_ABOVE = (
    "model.vision_backbone.image_vit.transformer.resblocks.22."  # above the last layer that is used
)
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


class MolmoeBackbone(OwnModelBackbone):
    """From a folder in the public layout."""

    name: ClassVar[str] = "molmoe"
    block_adapters = OLMOE_BLOCKS
    published_parameters: ClassVar[int] = 7_221_875_712
    published_unused = _UNUSED
    keys = KEYS
    chat = ChatTemplate(
        question=" User: {text} Assistant:",
        question_with_image="{image} User: {text} Assistant:",
        answer=" {text}{end}<|endoftext|>",
        # the published code would put the features of every image at the places of the first
        one_image=True,
        start="<|endoftext|>",
        document="<|endoftext|>{text}{end}<|endoftext|>",  # as OLMoE's
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
