"""OLMoE."""

from sglang.srt.models import olmoe

from gemoe_sglang.model import Gemoe


class OlmoeForCausalLM(Gemoe, olmoe.OlmoeForCausalLM):
    pass


EntryClass = OlmoeForCausalLM
