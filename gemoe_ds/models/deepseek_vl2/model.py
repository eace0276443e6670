"""DeepSeek-VL2-Tiny out of transformers' parts: it has the language model and SigLIP, no more.

Only Tiny: the larger ones have latent attention, which the text model here does not. Shapes: N
tiles, P = 27 x 27 patches of width V, Q = 14 x 14 features, D model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel

from gemoe_ds.errors import CheckpointError
from gemoe_ds.hf_io.hf_config import refuse_others
from gemoe_ds.models.deepseek_vl2.images import resolutions
from gemoe_ds.models.vision_language import VisionLanguageModel

PATCH = 14  # pixels


@dataclass(frozen=True)
class DeepseekVl2Config:
    """What differs between Tiny (the defaults) and a small one; the rest is fixed."""

    vocab_size: int = 129280
    d_model: int = 1280
    num_layers: int = 12
    num_dense_layers: int = 1  # the first ones
    num_heads: int = 10
    dense_width: int = 6848
    num_experts: int = 64
    top_k: int = 6
    num_shared: int = 2
    expert_width: int = 896
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position: int = 4096
    image_size: int = 384
    vision_width: int = 1152
    vision_layers: int = 27
    vision_heads: int = 16
    vision_ffn: int = 4304

    model_type = "deepseek_vl_v2"

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> DeepseekVl2Config:
        """From the public config.json; CheckpointError for the variants that are not Tiny's."""
        text, vision = found["language_config"], found["vision_config"]
        if text.get("use_mla", True):
            raise CheckpointError(
                "language_config.use_mla: latent attention (DeepSeek-VL2-Small and the full "
                "one); backbone 'deepseek_vl2' is DeepSeek-VL2-Tiny only"
            )
        fixed = {  # absent keys take the remote code's defaults, which are these
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "scoring_func": "softmax",
            "routed_scaling_factor": 1.0,
            "moe_layer_freq": 1,
            "rope_scaling": None,
            "attention_bias": False,
            "tie_word_embeddings": False,
        }
        refuse_others(text, fixed, "Tiny", "language_config.")
        if (
            text.get("num_key_value_heads", text["num_attention_heads"])
            != text["num_attention_heads"]
        ):
            raise CheckpointError("language_config.num_key_value_heads differs from the queries'")
        image_size = vision.get("image_size", 384)
        built_in = {
            "tile_tag": "2D",
            "global_view_pos": "head",
            "candidate_resolutions": [list(size) for size in resolutions(image_size)],
        }
        refuse_others(found, built_in, "Tiny")
        width = vision.get("width", 1152)
        return cls(
            vocab_size=int(text["vocab_size"]),
            d_model=int(text["hidden_size"]),
            num_layers=int(text["num_hidden_layers"]),
            num_dense_layers=int(text["first_k_dense_replace"]),
            num_heads=int(text["num_attention_heads"]),
            dense_width=int(text["intermediate_size"]),
            num_experts=int(text["n_routed_experts"]),
            top_k=int(text["num_experts_per_tok"]),
            num_shared=int(text["n_shared_experts"]),
            expert_width=int(text["moe_intermediate_size"]),
            norm_eps=text.get("rms_norm_eps", 1e-6),
            rope_theta=text.get("rope_theta", 10000.0),
            max_position=text.get("max_position_embeddings", 4096),
            image_size=image_size,
            vision_width=width,
            vision_layers=vision.get("layers", 27),
            vision_heads=vision.get("heads", 16),
            vision_ffn=int(width * vision.get("mlp_ratio", 3.7362)),
        )

    def to_json(self) -> dict[str, Any]:
        """The public config.json."""
        language = {
            "model_type": "deepseek_v2",
            "use_mla": False,
            "q_lora_rank": None,
            "kv_lora_rank": None,
            "qk_nope_head_dim": 0,
            "qk_rope_head_dim": 0,
            "v_head_dim": 0,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "vocab_size": self.vocab_size,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.num_layers,
            "first_k_dense_replace": self.num_dense_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "intermediate_size": self.dense_width,
            "n_routed_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "n_shared_experts": self.num_shared,
            "moe_intermediate_size": self.expert_width,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.max_position,
        }
        vision = {
            "image_size": self.image_size,
            "width": self.vision_width,
            "layers": self.vision_layers,
            "heads": self.vision_heads,
            "mlp_ratio": (self.vision_ffn + 0.5) / self.vision_width,  # cut off when multiplied
        }
        return {
            "model_type": self.model_type,
            "tile_tag": "2D",
            "global_view_pos": "head",
            "candidate_resolutions": [list(size) for size in resolutions(self.image_size)],
            "language_config": language,
            "vision_config": vision,
            "projector_config": {"n_embed": self.d_model},
        }

    def text(self) -> DeepseekOcr2TextConfig:
        num_sparse = self.num_layers - self.num_dense_layers
        return DeepseekOcr2TextConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.d_model,
            intermediate_size=self.dense_width,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            head_dim=self.d_model // self.num_heads,
            rms_norm_eps=self.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            max_position_embeddings=self.max_position,
            n_routed_experts=self.num_experts,
            n_shared_experts=self.num_shared,
            num_experts_per_tok=self.top_k,
            moe_intermediate_size=self.expert_width,
            mlp_layer_types=["dense"] * self.num_dense_layers + ["sparse"] * num_sparse,
            topk_method="greedy",
            n_group=1,
            topk_group=1,
        )

    def vision(self) -> SiglipVisionConfig:
        config = SiglipVisionConfig(
            hidden_size=self.vision_width,
            intermediate_size=self.vision_ffn,
            num_hidden_layers=self.vision_layers,
            num_attention_heads=self.vision_heads,
            image_size=self.image_size,
            patch_size=PATCH,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=1e-6,
        )
        config.vision_use_head = False
        return config


class DeepseekVl2Model(VisionLanguageModel):
    """The text model whose `<image>` embeddings are replaced by features."""

    def __init__(self, config: DeepseekVl2Config) -> None:
        super().__init__()
        self.config = config
        d_model = config.d_model
        self.language_model = DeepseekOcr2TextModel(config.text())
        self.lm_head = nn.Linear(d_model, config.vocab_size, bias=False)
        self.vision_tower = SiglipVisionModel(config.vision())
        self.projector = nn.Sequential(
            nn.Linear(4 * config.vision_width, d_model), nn.GELU(), nn.Linear(d_model, d_model)
        )
        self.image_newline = nn.Parameter(torch.zeros(d_model))
        self.view_seperator = nn.Parameter(torch.zeros(d_model))  # spelled as published

    @property
    def text(self) -> Any:
        return self.language_model

    @property
    def head(self) -> nn.Module:
        head: nn.Module = self.lm_head
        return head

    def image_features(self, images: dict[str, Tensor]) -> Tensor:
        """Rows of all images, in order: those of its `tiles`, its newline, its separator."""
        patches_NPV = self.vision_tower(images["pixels"]).last_hidden_state
        rows_NQD = self.projector(self._by_four(patches_NPV))
        ends_2D = torch.stack([self.image_newline, self.view_seperator]).to(rows_NQD.dtype)
        of_each = rows_NQD.split(images["tiles"].tolist())
        return torch.cat([row for image in of_each for row in (image.flatten(0, 1), ends_2D)])

    @staticmethod
    def _by_four(patches_NPV: Tensor) -> Tensor:
        """2 x 2 neighbours side by side, channel by channel; an odd side is padded with zeros."""
        side = round(patches_NPV.shape[1] ** 0.5)
        grid_NVHW = patches_NPV.transpose(1, 2).unflatten(2, (side, side))
        grid_NVHW = nn.functional.pad(grid_NVHW, (0, side % 2, 0, side % 2))
        return nn.functional.unfold(grid_NVHW, kernel_size=2, stride=2).transpose(1, 2)
