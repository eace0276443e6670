"""MolmoE-1B."""

import gemoe_ds.models.molmoe.backbone  # noqa: F401  (registers it)
