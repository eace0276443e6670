"""The small model that the demo pretrains."""

import gemoe_ds.models.tiny.backbone  # noqa: F401  (registers it)
