"""DeepSeek-VL2."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.models import deepseek_v2, deepseek_vl2

from gemoe_vllm.model import Gemoe


class GemoeDeepseekVL2(Gemoe, deepseek_vl2.DeepseekVLV2ForCausalLM):
    blocks_in = deepseek_v2

    def _init_vision_module(
        self, vision_config: Any, quant_config: Any, prefix: str = ""
    ) -> nn.Module:
        """The tower that was trained with, which is DeepSeek's: 27 x 27 patches of a tile of 384 x
        384 pixels, and the tanh form of GELU. vLLM's own makes 28 x 28 patches, and takes erf.
        Where `gemoe.enabled` is false too: the static k was trained with the same tower."""
        if not getattr(self.config, "gemoe", None):
            return super()._init_vision_module(vision_config, quant_config, prefix)
        import timm  # as vLLM does for this tower alone

        tower = timm.create_model(
            "vit_so400m_patch14_siglip_384.webli",
            pretrained=False,
            num_classes=0,
            act_layer="gelu_tanh",
        )
        if get_tensor_model_parallel_world_size() > 1:
            tower = self.patch_vit_for_tp(tower, quant_config)
        return tower.to(dtype=torch.get_default_dtype())
