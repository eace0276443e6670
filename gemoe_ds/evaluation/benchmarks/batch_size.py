"""How many tokens a forward of a benchmark may have: an estimate from the model and the device."""

from __future__ import annotations

import socket

import torch

from gemoe_ds.cluster.preflight import free_for_a_rank, ranks_by_host
from gemoe_ds.engine.world import World, gather_objects
from gemoe_ds.models.moe_model import MoEModel

AUTO = "auto"
_WIDE = 4  # bytes of a float32
_SHARE = {"cuda": 0.6, "cpu": 0.3}  # of what is free
# Where more tokens at a time bring nothing: a GPU is full, a CPU's caches are.
_MOST = {"cuda": 131_072, "cpu": 8_192}


def tokens_that_fit(model: MoEModel, max_length: int, world: World) -> int:
    """On the rank with the least memory, one sequence at least. Collective."""
    kind = world.device.type
    free = free_for_a_rank(world.device, ranks_by_host()[socket.gethostname()])
    if kind == "cuda":  # torch has some of it in reserve
        free += torch.cuda.memory_reserved(world.device) - torch.cuda.memory_allocated(world.device)
    fitting = int(free * _SHARE.get(kind, 0.3) / bytes_per_token(model))
    return max(min([_MOST.get(kind, 8_192), *gather_objects(fitting)]), max_length)


def bytes_per_token(model: MoEModel) -> int:
    """Keys and values of all layers, and what one layer at a time computes, without gradients."""
    first, itemsize = model.routing[0], model.dtype.itemsize
    d_model, k = first.d_model, max(layer.router.max_k for layer in model.moe_layers)
    width = max(model.params_per_expert) // (3 * d_model)  # gate, up and down
    cached = 2 * len(model.routing) * d_model * itemsize
    attention = 8 * d_model * itemsize  # queries, keys, values, the result, norms in float32
    experts = k * (3 * width + d_model) * itemsize + 2 * d_model * _WIDE
    return cached + attention + experts + 4 * first.num_experts * _WIDE
