"""MolmoE-1B."""

import gemoe_ds.backbones.molmoe.backbone  # noqa: F401  (registers it)
