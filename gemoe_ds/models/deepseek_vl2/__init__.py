"""DeepSeek-VL2-Tiny."""

import gemoe_ds.models.deepseek_vl2.backbone  # noqa: F401  (registers it)
