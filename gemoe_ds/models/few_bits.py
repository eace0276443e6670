"""Which parameters of a model go into 8 or 4 bits in a folder of `gemoe export --quantise`."""

from __future__ import annotations

from torch import nn

from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.quantised_linear import linear_maps


def format_of(backbone: Backbone, model: nn.Module, of_experts: str) -> dict[str, str]:
    """Names -> formats: experts in this one; linear maps in 8 bits, gates and embeddings not.

    In a float8 folder those of the language model's layers alone, as Qwen publishes it:
    transformers and vLLM read it. `model`: as it is loaded, before its blocks are converted.
    """
    blocks = backbone.moe_blocks(model)
    found = {f"{block.path}.{name}": of_experts for block in blocks for name in block.names[1:]}
    of_layers = blocks[0].path.partition(".layers.")[0] + ".layers."
    for path in linear_maps(model, [block.gate_ED for block in blocks]):
        if of_experts != "float8":
            found[f"{path}.weight"] = "int8"
        elif path.startswith(of_layers):
            found[f"{path}.weight"] = "float8"
    return found
