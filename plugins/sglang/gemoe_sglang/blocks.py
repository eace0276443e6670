"""Our routing in the MoE blocks of an SGLang model that is built.

An SGLang block has `gate`, `topk` and `experts`. `topk.topk_config` says how to route; with a
`custom_routing_function` it asks that one, and hands ids and weights to any kernel.
Imports no SGLang: what is used of it are these names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gemoe_sglang._gemoe.errors import ConfigError
from gemoe_sglang._served.described import layer_of
from gemoe_sglang._served.options import FOLD, ZERO
from gemoe_sglang._served.routing import Routing

# SGLang gives rows of padding the id -1 itself, so its kernels may skip such slots; not run.
SLOTS = (FOLD, ZERO)


class NoGate(nn.Module):
    """In place of the stock gate, whose product nobody reads: the router has its own, float32."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Logits [T, 1] of no meaning, and no bias."""
        return hidden_states.new_zeros(len(hidden_states), 1), None


def install(model: nn.Module, routings: Mapping[int, Routing]) -> None:
    """Each block of `routings`, by layer, routes by it. ConfigError if a block is not there, or if
    its kernels would route on their own."""
    found = {
        layer_of(path): block
        for path, block in model.named_modules()
        if hasattr(block, "topk") and hasattr(block, "experts") and ".layers." in f".{path}."
    }
    if sorted(found) != sorted(routings):
        raise ConfigError(
            f"config.json has `gemoe` for layers {sorted(routings)}, and the model has MoE blocks "
            f"in layers {sorted(found)}; export the run again, and start without pipeline parallel"
        )
    for layer, routing in routings.items():
        _install(found[layer], routing, layer)


def _install(block: Any, routing: Routing, layer: int) -> None:
    config = block.topk.topk_config
    if routing.width > config.top_k:
        raise ConfigError(
            f"layer {layer}: a token may use {routing.width} experts, and SGLang builds its "
            f"experts for {config.top_k}; take a router whose k is at most that of the base model"
        )
    how = config.output_format
    if how is not None and getattr(how, "name", how) != "STANDARD":
        raise ConfigError(
            f"layer {layer}: this MoE backend takes its routing as {getattr(how, 'name', how)}, "
            "not as ids and weights; choose another --moe-runner-backend, such as triton"
        )
    if config.num_shared_topk_slots:
        raise ConfigError(
            f"layer {layer}: shared experts are fused with the routed ones; start with "
            "--disable-shared-experts-fusion"
        )
    routing.width = config.top_k  # as many slots as the kernels expect
    config.custom_routing_function = routing
    config.use_grouped_topk = False
    config.correction_bias = None
    config.renormalize = False  # the router has said what the weights are
    config.routed_scaling_factor = None
    block.gate = NoGate()
