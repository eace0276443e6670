"""What people read of the routing, from the statistics that the routers record.

A number of one layer is called "name/layer_00". Shapes: E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from gemoe_ds.moe.context import Stat, TokenContext

IN_SHORT = ("mean_k",)  # of the whole model, for a line that has room for few


def layer_stats(ctx: TokenContext) -> Iterator[tuple[str, Stat]]:
    """What the routers have recorded in the last forward pass, by name and layer."""
    for layer, record in enumerate(ctx.layers):
        for name, stat in record.stats.items():
            yield f"{name}/layer_{layer:02d}", stat


def derived(values: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
    """The values (sums and means over all ranks), and what follows from them.

    The load of each expert becomes max / mean and the number of idle experts; the mean k of all
    layers is added.
    """
    found: dict[str, float | Tensor] = {}
    for name, value in values.items():
        kind, _, layer = name.partition("/")
        if kind == "tokens_per_expert":
            load_E = value
            found[f"load_max_over_mean/{layer}"] = (
                load_E.max() / load_E.mean().clamp_min(1e-9)
            ).item()
            found[f"idle_experts/{layer}"] = float((load_E == 0).sum())
        else:
            found[name] = value
    mean_k = [value.double().squeeze() for n, value in values.items() if n.startswith("mean_k/")]
    if mean_k:  # not in a step that was left out
        found["mean_k"] = torch.stack(mean_k).mean()
    return found
