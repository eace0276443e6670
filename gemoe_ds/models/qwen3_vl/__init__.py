"""Qwen3-VL-30B-A3B."""

import gemoe_ds.models.qwen3_vl.backbone  # noqa: F401  (registers it)
