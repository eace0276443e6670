"""OLMoE."""

from vllm.model_executor.models import olmoe

from gemoe_vllm.model import Gemoe


class GemoeOlmoe(Gemoe, olmoe.OlmoeForCausalLM):
    blocks_in = olmoe
