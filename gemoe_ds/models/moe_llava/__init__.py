"""MoE-LLaVA on StableLM-2 and on Qwen."""

import gemoe_ds.models.moe_llava.backbone  # noqa: F401  (registers them)
