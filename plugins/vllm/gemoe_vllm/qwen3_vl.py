"""Qwen3-VL-MoE."""

from vllm.model_executor.models import qwen3_moe, qwen3_vl_moe

from gemoe_vllm.model import Gemoe


class GemoeQwen3VL(Gemoe, qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration):
    blocks_in = qwen3_moe
