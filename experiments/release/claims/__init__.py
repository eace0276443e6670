"""What README and docs claim, a module a page or a group of pages.

A module has CLAIMS and NOT_MEASURED: for each page, words whose numbers are no measurement (a
definition, a default, a figure of somebody else's paper, a bound that a test holds).
"""

from __future__ import annotations

import importlib
import pkgutil

from experiments.release.claim import Claim


def all_claims() -> list[Claim]:
    return [claim for module in _modules() for claim in module.CLAIMS]


def not_measured() -> dict[str, list[str]]:
    """By page."""
    found: dict[str, list[str]] = {}
    for module in _modules():
        for page, words in module.NOT_MEASURED.items():
            found.setdefault(page, []).extend(words)
    return found


def _modules() -> list:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [importlib.import_module(f"{__name__}.{name}") for name in names]
