"""MoE-LLaVA-StableLM-1.6B-4e and -Qwen-1.8B-4e: 4 experts, top-2, in every other layer.

MoE-LLaVA (arXiv 2401.15947) draws the second expert with noise, in evaluation too, and drops what
exceeds a capacity; here the second best is taken and nothing is dropped. Its Phi-2 variant is not
here: its FFNs have one projection and biases, our experts are SwiGLU.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn
from transformers import CLIPVisionModel

from gemoe_ds.errors import CheckpointError, ConfigError
from gemoe_ds.hf_io.hf_config import meta_model
from gemoe_ds.hf_io.quiet import without_report
from gemoe_ds.hf_io.safetensors_reader import open_stored
from gemoe_ds.models.backbone import HFModel
from gemoe_ds.models.chat import ChatTemplate
from gemoe_ds.models.moe_llava.images import PaddedSquare
from gemoe_ds.models.moe_llava.keys import QWEN_KEYS, STABLELM_KEYS
from gemoe_ds.models.moe_llava.model import (
    MoeLlavaConfig,
    MoeLlavaModel,
    MoeLlavaQwenConfig,
    MoeLlavaStableLmConfig,
)
from gemoe_ds.models.own_model import OwnModelBackbone
from gemoe_ds.models.upcycled.backbone import UPCYCLED_BLOCKS
from gemoe_ds.registry import ConfigModel, Reads


class MoeLlavaBackbone(OwnModelBackbone):
    """What the family has in common; `config_class` and `keys` are the language model's."""

    config_class: ClassVar[type[MoeLlavaConfig]]
    block_adapters = UPCYCLED_BLOCKS
    published_part = "language_model."  # without tower and projector
    may_lack = ("vision_tower.*",)
    chat = ChatTemplate(
        start="A chat between a curious user and an artificial intelligence assistant. The "
        "assistant gives helpful, detailed, and polite answers to the user's questions. ",
        system="{text} ",
        document="{text}{end}<|endoftext|>",  # neither StableLM 2 nor Qwen has a bos
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
        if not _has_tower(checkpoint):
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

    def with_lacking(
        self, model: nn.Module, state: Mapping[str, Tensor], base: Path
    ) -> Mapping[str, Tensor]:
        """A base without its tower gets it, under the public names."""
        if _has_tower(base):
            return state
        tower = {
            n: p.detach() for n, p in model.named_parameters() if n.startswith("vision_tower.")
        }
        return ChainMap(state, tower)  # type: ignore[arg-type]  # neither is written to

    def image_layout(self, model: HFModel) -> PaddedSquare:
        return PaddedSquare(model.config.vision.image_size)


def _has_tower(folder: Path) -> bool:
    return any("image_tower." in key for key in open_stored(folder))


class MoeLlavaStableLmBackbone(MoeLlavaBackbone):
    """From a folder in the public layout."""

    name: ClassVar[str] = "moe_llava_stablelm"
    config_class = MoeLlavaStableLmConfig
    published_parameters: ClassVar[int] = 2_890_321_920
    keys = STABLELM_KEYS


class MoeLlavaQwenBackbone(MoeLlavaBackbone):
    """From a folder in the public layout: Qwen's names, w2 is the gate and w1 is up."""

    name: ClassVar[str] = "moe_llava_qwen"
    config_class = MoeLlavaQwenConfig
    published_parameters: ClassVar[int] = 3_054_323_712
    keys = QWEN_KEYS
