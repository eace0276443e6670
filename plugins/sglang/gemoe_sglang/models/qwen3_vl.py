"""Qwen3-VL-MoE."""

from sglang.srt.models import qwen3_vl_moe

from gemoe_sglang.model import Gemoe


class Qwen3VLMoeForConditionalGeneration(Gemoe, qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration):
    pass


EntryClass = Qwen3VLMoeForConditionalGeneration
