"""OLMoE-1B-7B: text only, 64 experts a layer, top-8, scores not renormalised.

Public folders (allenai/OLMoE-1B-7B-0924, -SFT, -Instruct) hold three matrices an expert; see
arXiv 2409.02060 and transformers' `olmoe`.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from gemoe_ds.hf_io.hf_config import meta_model
from gemoe_ds.hf_io.key_rules import KeyMap, expert_tables
from gemoe_ds.models.backbone import Backbone, Golden, HFModel
from gemoe_ds.models.blocks import Adapters, stock_block
from gemoe_ds.models.chat import ChatTemplate
from gemoe_ds.models.inputs import ModelInputs
from gemoe_ds.models.kv_cache import attention_inputs

OLMOE_BLOCKS: Adapters = {OlmoeSparseMoeBlock: stock_block}
_EXPERTS = "model.layers.{l}.mlp.experts"


class OlmoeBackbone(Backbone):
    """`OlmoeForCausalLM` of transformers, from a folder; a sample with an image is refused."""

    name: ClassVar[str] = "olmoe"
    block_adapters = OLMOE_BLOCKS
    published_parameters: ClassVar[int] = 6_919_161_856
    golden = Golden(  # of the base model, as tinygrad's examples/olmoe.py has them
        "OLMoE-1B-7B-0924",
        50304,
        (12092,),
        (13, 309, 717, 247, 747, 17782, 281, 436, 12209, 285, 309, 717, 2820, 281, 755),
    )
    keys = KeyMap(experts=expert_tables(_EXPERTS, _EXPERTS))
    # The Instruct model's; the role marks are plain text in its vocabulary.
    chat = ChatTemplate(
        system="{bos}<|system|>\n{text}\n",
        question="<|user|>\n{text}\n<|assistant|>\n",
        answer="{text}{end}{eos}\n",
        joined=True,
        eos_as_bos=True,
    )

    def load(self, checkpoint: Path | None, tokenizer_dir: Path) -> nn.Module:
        return self.described(OlmoeForCausalLM, OlmoeConfig, checkpoint)

    @classmethod
    def published(cls) -> nn.Module:
        """OLMoE-1B-7B-0924; what is not said is transformers' default, and the same there."""
        config = OlmoeConfig(intermediate_size=1024, architectures=["OlmoeForCausalLM"])
        return meta_model(OlmoeForCausalLM, config)

    def hidden(self, model: HFModel, inputs: ModelInputs) -> Tensor:
        hidden_BSD: Tensor = model.model(
            inputs.input_ids_BS,
            **attention_inputs(inputs.is_valid_BS, inputs.past, document_BS=inputs.document_BS),
        ).last_hidden_state
        return hidden_BSD

    def head(self, model: HFModel) -> nn.Module:
        return model.lm_head
