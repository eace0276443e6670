"""vLLM plugin: exported folders are served with the k that each token chose in training."""

from __future__ import annotations

__version__ = "0.2.0"

# Architecture in config.json -> where its class is. A folder without `gemoe` in its config.json is
# served by the same class as if the plugin was not there.
MODELS = {
    "OlmoeForCausalLM": "gemoe_vllm.olmoe:GemoeOlmoe",
    "Qwen3VLMoeForConditionalGeneration": "gemoe_vllm.qwen3_vl:GemoeQwen3VL",
    "DeepseekVLV2ForCausalLM": "gemoe_vllm.deepseek_vl2:GemoeDeepseekVL2",
}


def register() -> None:
    """vLLM calls this in each of its processes, possibly twice. RuntimeError: another vLLM.

    Imports no model, and nothing that touches a device.
    """
    from gemoe_vllm import metrics, versions

    versions.check()
    from vllm import ModelRegistry

    for architecture, place in MODELS.items():
        ModelRegistry.register_model(architecture, place)
    metrics.register()
