"""MoE-LLaVA on StableLM-2 and on Qwen."""

import gemoe_ds.backbones.moe_llava.backbone  # noqa: F401  (registers them)
