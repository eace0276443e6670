"""MoE-LLaVA out of transformers' parts: dense StableLM-2 or Qwen, CLIP, and upcycled MoE blocks.

Shapes: N images, P patches of width V, D model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from gemoe_ds.errors import CheckpointError
from gemoe_ds.models.upcycled.model import UpcycledMoEBlock
from gemoe_ds.models.vision_language import VisionLanguageModel


@dataclass(frozen=True)
class Vision:
    """CLIP ViT-L/14-336 (the defaults), whose last layer but one is looked at."""

    image_size: int = 336
    width: int = 1024
    layers: int = 24
    heads: int = 16
    ffn: int = 4096

    def config(self) -> CLIPVisionConfig:
        return CLIPVisionConfig(
            hidden_size=self.width,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            image_size=self.image_size,
            patch_size=14,
        )


@dataclass(frozen=True)
class MoeLlavaConfig:
    """What the public config.json of one of the family says."""

    text: StableLmConfig | Qwen2Config
    width: int  # of an expert, which is that of a dense FFN
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    vision: Vision

    shapes: ClassVar[dict[str, int]]  # of the published language model

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> MoeLlavaConfig:
        """From the public config.json."""
        raise NotImplementedError

    @classmethod
    def published(cls) -> MoeLlavaConfig:
        """-1.6B-4e and -1.8B-4e, whatever their config.json may say beside shapes."""
        large = {"hidden_size": 2048, "num_hidden_layers": 24, "moe": {"num_experts": [4] * 12}}
        return cls.from_json(large | cls.shapes)

    @classmethod
    def parts(cls, found: dict[str, Any]) -> dict[str, Any]:
        """What does not depend on the language model; CheckpointError for other variants."""
        moe, num_layers = found["moe"], found["num_hidden_layers"]
        counts, layers = moe["num_experts"], moe.get("moe_layers_idx") or range(0, num_layers, 2)
        counts = counts if isinstance(counts, list) else [counts]
        if any(type(n) is not int or n < 1 for n in counts) or len(set(counts)) != 1:
            raise CheckpointError(
                f"moe.num_experts={moe['num_experts']}: the same number in all layers is supported"
            )
        if any(type(n) is not int or not 0 <= n < num_layers for n in layers):
            raise CheckpointError(f"moe.moe_layers_idx={layers}, there are {num_layers} layers")
        if len(counts) not in (1, len(set(layers))):
            raise CheckpointError(
                f"moe.num_experts={counts} is of {len(counts)} layers, moe_layers_idx={layers}"
            )
        if moe.get("use_residual"):
            raise CheckpointError("moe.use_residual: residual experts are not supported")
        kind = found.get("image_projector_type", found.get("mm_projector_type", "mlp2x_gelu"))
        if kind != "mlp2x_gelu":
            raise CheckpointError(f"projector {kind!r}, backbones 'moe_llava_*' have 'mlp2x_gelu'")
        if found.get("mm_vision_select_layer", -2) != -2:
            raise CheckpointError(f"mm_vision_select_layer={found['mm_vision_select_layer']}")
        tower = str(found.get("mm_image_tower", found.get("mm_vision_tower", "")))
        if "siglip" in tower:
            raise CheckpointError(f"image tower {tower}: only CLIP ViT-L/14-336 is supported")
        return {
            "moe_layers": tuple(layers),
            "num_experts": counts[0],
            "top_k": moe.get("top_k_experts", 2),
            "vision": Vision(**found.get("vision", {})),
        }


class MoeLlavaStableLmConfig(MoeLlavaConfig):
    model_type = "moe_llava_stablelm"
    shapes = {"vocab_size": 100352, "num_attention_heads": 32, "intermediate_size": 5632}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> MoeLlavaStableLmConfig:
        """StableLM-2's keys, by their older names or transformers'."""
        width = found["intermediate_size"]
        text = StableLmConfig(
            vocab_size=found["vocab_size"],
            hidden_size=found["hidden_size"],
            intermediate_size=width,
            num_hidden_layers=found["num_hidden_layers"],
            num_attention_heads=found["num_attention_heads"],
            num_key_value_heads=found.get("num_key_value_heads", found["num_attention_heads"]),
            max_position_embeddings=found.get("max_position_embeddings", 4096),
            layer_norm_eps=found.get("norm_eps", found.get("layer_norm_eps", 1e-5)),
            use_qkv_bias=found.get("use_qkv_bias", True),
            rope_parameters={
                "rope_type": "default",
                "rope_theta": float(found.get("rope_theta", 10000)),
                "partial_rotary_factor": found.get("rope_pct", 0.25),
            },
        )
        return cls(text, width, **cls.parts(found))


class MoeLlavaQwenConfig(MoeLlavaConfig):
    model_type = "moe_llava_qwen"
    shapes = {"vocab_size": 151936, "num_attention_heads": 16, "intermediate_size": 11008}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> MoeLlavaQwenConfig:
        """Qwen's (the first) keys. Beyond its training length it would rescale; we do not."""
        width = found["intermediate_size"] // 2  # of gate and up together
        text = Qwen2Config(
            vocab_size=found["vocab_size"],
            hidden_size=found["hidden_size"],
            intermediate_size=width,
            num_hidden_layers=found["num_hidden_layers"],
            num_attention_heads=found["num_attention_heads"],
            num_key_value_heads=found["num_attention_heads"],
            max_position_embeddings=found.get("seq_length", 8192),
            rms_norm_eps=found.get("layer_norm_epsilon", 1e-6),
            rope_parameters={
                "rope_type": "default",
                "rope_theta": float(found.get("rotary_emb_base", 10000)),
            },
            tie_word_embeddings=False,
        )
        return cls(text, width, **cls.parts(found))


class MoeLlavaModel(VisionLanguageModel):
    """The language model, some of whose FFNs are MoE blocks, behind CLIP and two linear maps."""

    def __init__(self, config: MoeLlavaConfig) -> None:
        super().__init__()
        self.config, text = config, config.text
        is_qwen = isinstance(text, Qwen2Config)
        self.language_model = (Qwen2ForCausalLM if is_qwen else StableLmForCausalLM)(text)
        block = {"num_experts": config.num_experts, "top_k": config.top_k, "norm_topk_prob": True}
        for layer in config.moe_layers:
            mlp = UpcycledMoEBlock(block, text.hidden_size, config.width)
            self.language_model.model.layers[layer].mlp = mlp
        self.vision_tower = CLIPVisionModel(config.vision.config())
        self.projector = nn.Sequential(
            nn.Linear(config.vision.width, text.hidden_size),
            nn.GELU(),
            nn.Linear(text.hidden_size, text.hidden_size),
        )

    @property
    def text(self) -> Any:
        return self.language_model.model

    @property
    def head(self) -> nn.Module:
        head: nn.Module = self.language_model.lm_head
        return head

    def image_features(self, images: dict[str, Tensor]) -> Tensor:
        """[N * P, D]: of every patch, the class token left out."""
        seen = self.vision_tower(images["pixels"], output_hidden_states=True).hidden_states[-2]
        features: Tensor = self.projector(seen[:, 1:])
        return features.flatten(0, 1)
