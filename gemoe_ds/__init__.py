"""gemoe_ds: train MoE models in which every token picks how many experts it needs.

What a library user needs is here, and imported when it is asked for: `import gemoe_ds` alone
loads neither torch nor DeepSpeed. docs/api.md shows how each is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemoe_ds.evaluation.records import evaluate as evaluate
    from gemoe_ds.models.convert import convert as convert
    from gemoe_ds.moe.layer import MoELayer as MoELayer
    from gemoe_ds.moe.router import Router as Router
    from gemoe_ds.train import start as train

__version__ = "0.2.0"

_HOMES = {
    "MoELayer": "gemoe_ds.moe.layer",
    "Router": "gemoe_ds.moe.router",
    "convert": "gemoe_ds.models.convert",
    "evaluate": "gemoe_ds.evaluation.records",
}
__all__ = ["MoELayer", "Router", "convert", "evaluate", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":  # the package of this name is the function too
        return import_module("gemoe_ds.train")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module("gemoe_ds.routers")  # every router has its name
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
