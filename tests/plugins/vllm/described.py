"""`gemoe` of a config.json and routers.safetensors, as `gemoe export` writes them."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch

from gemoe_ds.moe.router import Router, RoutingSpec
from tests.routers.cases import SPEC, make_router


def make_described(
    name: str, options: dict, layers: int = 2, spec: RoutingSpec = SPEC
) -> tuple[dict, dict[str, torch.Tensor], list[Router]]:
    """The two, and the routers that they are of. The first layer is dense: block n is layer n+1."""
    specs = [replace(spec, slot=slot, num_layers=layers) for slot in range(layers)]
    routers = [make_router(name, options, one, seed=one.slot).eval() for one in specs]
    for router in routers:
        for parameter in router.parameters():  # trained, so to say
            parameter.data += 0.2 * torch.randn_like(parameter)
    tensors = {
        f"{slot}.{key}": tensor
        for slot, router in enumerate(routers)
        for key, tensor in router.state_dict().items()
    }
    blocks = [{"path": f"model.layers.{one.slot + 1}.mlp", "routing": asdict(one)} for one in specs]
    return {"router": {"name": name} | options, "blocks": blocks}, tensors, routers
