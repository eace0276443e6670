"""A dense LLaVA whose FFNs become experts."""

import gemoe_ds.models.upcycled.backbone  # noqa: F401  (registers it)
