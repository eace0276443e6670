"""Styles of prompts, registered by importing the package."""

from gemoe_ds.registry import import_all

import_all(__name__, list(__path__))
