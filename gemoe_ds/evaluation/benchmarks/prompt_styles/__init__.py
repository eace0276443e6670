"""Styles of prompts: whoever imports one, or their base, has registered them all."""

from gemoe_ds.registry import import_all

import_all(__name__, list(__path__))
