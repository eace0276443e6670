"""Backbones: the only room that knows transformers; importing the package registers them all."""

from gemoe_ds.registry import import_all

import_all(__name__, list(__path__))
