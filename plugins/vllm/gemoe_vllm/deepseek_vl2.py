"""DeepSeek-VL2."""

from vllm.model_executor.models import deepseek_v2, deepseek_vl2

from gemoe_vllm.model import Gemoe


class GemoeDeepseekVL2(Gemoe, deepseek_vl2.DeepseekVLV2ForCausalLM):
    blocks_in = deepseek_v2
