"""MolmoE-1B out of transformers' parts: it has OLMoE and CLIP, but no class for the whole.

The public repository brings code of its own that no longer loads; this replaces it. Shapes: N
crops, P patches of a crop, Q = P / 4 features, V = twice the tower's width, D model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, OlmoeConfig, OlmoeForCausalLM

from gemoe_ds.errors import CheckpointError
from gemoe_ds.hf_io.hf_config import refuse_others
from gemoe_ds.models.images import add_features
from gemoe_ds.models.molmoe.connector import Pooling, Projector
from gemoe_ds.models.vision_language import VisionLanguageModel


@dataclass(frozen=True)
class MolmoeConfig:
    """What differs between MolmoE-1B (the defaults) and a small one; the rest is fixed."""

    vocab_size: int = 50304
    d_model: int = 2048
    num_layers: int = 16
    num_heads: int = 16
    num_experts: int = 64
    top_k: int = 8
    expert_width: int = 1024
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position: int = 4096
    # The tower is CLIP ViT-L/14-336, of which only what lies below the last used layer is kept:
    # the public checkpoint has 23 layers, the outputs of 22 and 15 are used.
    image_size: int = 336
    vision_width: int = 1024
    vision_heads: int = 16
    vision_ffn: int = 4096
    vision_layers: tuple[int, int] = (22, 15)  # how many layers lie below, in order of use
    connector_width: int = 1024

    model_type = "molmo"

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> MolmoeConfig:
        """From the public config.json; CheckpointError for a dense Molmo and for odd variants."""
        if not found.get("moe_num_experts"):
            raise CheckpointError(
                "a dense Molmo (no moe_num_experts); backbone 'molmoe' is MolmoE-1B only"
            )
        fixed: dict[str, Any] = {
            "attention_layer_norm": True,
            "include_bias": False,
            "qkv_bias": False,
            "rope_impl": "llama",  # dimension i turns with i + d/2
            "use_position_ids": True,
            "block_type": "moe",
            "moe_dropless": True,
            "norm_after": False,
            "weight_tying": False,
            "clip_qkv": None,
            "activation_type": "swiglu",
            "layer_norm_type": "rms",
            "rope": True,
            "alibi": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "scale_logits": False,
            "normalize_input_embeds": False,
            "image_padding_embed": "pad_and_partial_pad",
            "image_pooling_2d": "attention-meanq",
            "image_projector": "mlp",
            "use_cls_feature": False,
            "unconditioned": False,
        }
        if "vision_layers" not in found:
            fixed["vit_layers"] = [-2, -9]
        refuse_others(found, fixed, "backbone 'molmoe'")
        d_model, num_heads = found["d_model"], found["n_heads"]
        if found.get("n_kv_heads") not in (None, num_heads):
            raise CheckpointError(f"n_kv_heads={found['n_kv_heads']}, 'molmoe' has {num_heads}")
        own = {name: found[name] for name in _OWN_KEYS if name in found}
        options: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in own.items()
        }
        return cls(
            vocab_size=found.get("embedding_size") or found["vocab_size"],
            d_model=d_model,
            num_layers=found["n_layers"],
            num_heads=num_heads,
            num_experts=found["moe_num_experts"],
            top_k=found["moe_top_k"],
            expert_width=found["mlp_ratio"] * d_model // 2,  # of gate and up together
            norm_eps=found.get("layer_norm_eps", 1e-5),
            rope_theta=found.get("rope_theta", 10000.0),
            max_position=found.get("max_sequence_length", 4096),
            **options,
        )

    def to_json(self) -> dict[str, Any]:
        """The public config.json, with a key of ours for whatever is not MolmoE-1B's."""
        found = {
            "model_type": self.model_type,
            "architectures": ["OLMoForCausalLM"],
            "attention_layer_norm": True,
            "d_model": self.d_model,
            "n_heads": self.num_heads,
            "n_layers": self.num_layers,
            "mlp_ratio": 2 * self.expert_width // self.d_model,
            "moe_num_experts": self.num_experts,
            "moe_top_k": self.top_k,
            "embedding_size": self.vocab_size,
            "vocab_size": self.vocab_size,
            "layer_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "max_sequence_length": self.max_position,
        }
        return found | {name: getattr(self, name) for name in _OWN_KEYS}

    def text(self) -> OlmoeConfig:
        return OlmoeConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.d_model,
            intermediate_size=self.expert_width,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            num_experts=self.num_experts,
            num_experts_per_tok=self.top_k,
            norm_topk_prob=False,
            rms_norm_eps=self.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            max_position_embeddings=self.max_position,
            tie_word_embeddings=False,
        )

    def vision(self) -> CLIPVisionConfig:
        return CLIPVisionConfig(
            hidden_size=self.vision_width,
            intermediate_size=self.vision_ffn,
            num_hidden_layers=max(self.vision_layers),
            num_attention_heads=self.vision_heads,
            image_size=self.image_size,
            patch_size=14,
            hidden_act="quick_gelu",
            layer_norm_eps=1e-5,
        )


# Not in the public file, where the tower is always the same; a small model states them.
_OWN_KEYS = (
    *("image_size", "vision_width", "vision_heads", "vision_ffn"),
    *("vision_layers", "connector_width"),
)


class MolmoeModel(VisionLanguageModel):
    """OLMoE to whose token embeddings image features are ADDED (patch tokens keep their own)."""

    def __init__(self, config: MolmoeConfig) -> None:
        super().__init__()
        self.config = config
        vision_width = len(config.vision_layers) * config.vision_width
        self.language_model = OlmoeForCausalLM(config.text())
        self.vision_tower = CLIPVisionModel(config.vision())
        # the checkpoint has none
        self.vision_tower.add_module("post_layernorm", nn.Identity())
        self.pad_embed = nn.Parameter(torch.zeros(2, vision_width))
        self.pooling = Pooling(vision_width, config.connector_width, config.vision_heads)
        self.projector = Projector(config.connector_width, config.d_model // 2, config.d_model)

    @property
    def text(self) -> Any:
        return self.language_model.model

    @property
    def head(self) -> nn.Module:
        head: nn.Module = self.language_model.lm_head
        return head

    @staticmethod
    def put(embedded_BSD: Tensor, features_FD: Tensor, feature_BS: Tensor) -> Tensor:
        return add_features(embedded_BSD, features_FD, feature_BS)

    def image_features(self, images: dict[str, Tensor]) -> Tensor:
        """Rows [N * Q, D] of all crops, in their order; `mask` [N, P] as MolmoeImages makes it."""
        pixels_NCHW, mask_NP = images["pixels"], images["mask"]
        states = self.vision_tower(pixels_NCHW, output_hidden_states=True).hidden_states
        patches_NPV = torch.cat([states[n][:, 1:] for n in self.config.vision_layers], dim=-1)
        is_empty_NP = mask_NP == 0
        is_partial_NP = (mask_NP < 1) & ~is_empty_NP  # -1, the filler, among them
        for row, chosen_NP in zip(self.pad_embed, (is_empty_NP, is_partial_NP), strict=True):
            patches_NPV = patches_NPV + chosen_NP[..., None] * row.to(patches_NPV.dtype)
        return self.projector(self.pooling(patches_NPV)).flatten(0, 1)
