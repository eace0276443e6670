"""OLMoE-1B-7B."""

import gemoe_ds.models.olmoe.backbone  # noqa: F401  (registers it)
