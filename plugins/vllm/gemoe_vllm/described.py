"""Routers of what config.json says under `gemoe`; what cannot be served is refused."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import gemoe_vllm._gemoe.routers  # noqa: F401  (registers every router)
from gemoe_vllm._gemoe.errors import ConfigError
from gemoe_vllm._gemoe.moe.router import Router, RoutingSpec
from gemoe_vllm.options import Options

FILE = "routers.safetensors"  # in the exported folder
FACTOR = "k_scale"  # the factor on k that some routers have beside their dial


def trained_routing(config: Any) -> Mapping[str, Any] | None:
    """`gemoe` of config.json; None: the static k is served, as the folder's own code does.

    That is where there is no `gemoe`, or its `enabled` is false. ConfigError if that is no boolean.
    """
    found: Mapping[str, Any] | None = getattr(config, "gemoe", None)
    if not found:
        return None
    enabled = found.get("enabled", True)
    if not isinstance(enabled, bool):
        raise ConfigError(f"config.json: gemoe.enabled={enabled!r}; it is true or false")
    return found if enabled else None


def make_routers(described: Mapping[str, Any], options: Options) -> dict[int, Router]:
    """By the number of its layer, the router of each MoE block, on the CPU and without its state.

    `described` is `gemoe` of config.json. Raises ConfigError, of one line, for a router that is
    unknown or cannot be served, and for options that it has not.
    """
    chosen = dict(described["router"])
    name = chosen.pop("name")
    kind = Router.named(name)
    _check_dial(kind, options)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # vLLM sets the model's while it builds one
    try:
        with torch.device("cpu"):
            kind, config = Router.configured(name, chosen | dict(options.router))
            routers = {
                layer_of(entry["path"]): kind(config, RoutingSpec(**entry["routing"]))
                for entry in described["blocks"]
            }
    finally:
        torch.set_default_dtype(dtype)
    for router in routers.values():
        _check_servable(router)
        router.eval().requires_grad_(False)
    return routers


def layer_of(path: str) -> int:
    """The number in `layers.3.`; the same in transformers' names, in vLLM's and in the files'."""
    found = re.search(r"layers\.(\d+)\.", path + ".")
    assert found, path
    return int(found.group(1))


def load(routers: Mapping[int, Router], tensors: Mapping[str, Tensor]) -> None:
    """The state of all routers from FILE; ConfigError if it is not there whole."""
    for slot, (layer, router) in enumerate(routers.items()):
        prefix = f"{slot}."
        own = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        missing = sorted(router.state_dict().keys() - own.keys())
        unknown = sorted(own.keys() - router.state_dict().keys())
        if missing or unknown:
            raise ConfigError(
                f"{FILE} does not fit layer {layer}: missing {missing}, unknown {unknown}; export "
                "the run again"
            )
        router.load_state_dict(own)


def others(
    weights: Iterable[tuple[str, Tensor]], layers: Container[int]
) -> Iterator[tuple[str, Tensor]]:
    """What the stock model loads: without the gates of these layers, which are in the routers, and
    without the routers, which come along where a folder has no index."""
    for name, tensor in weights:
        of_router = re.match(r"\d+\.", name)
        of_gate = name.endswith(".mlp.gate.weight") and layer_of(name) in layers
        if not of_router and not of_gate:
            yield name, tensor


def _check_dial(kind: type[Router], options: Options) -> None:
    """Only what moves k may differ from training."""
    allowed = [
        name
        for name in (kind.dial, FACTOR)
        if name is not None and name in kind.Config.model_fields
    ]
    for name in options.router:
        if name not in allowed:
            what = ", ".join(["slots", *allowed])
            raise ConfigError(
                f"--additional-config: gemoe.{name} cannot be set for router {kind.name}; it has "
                f"{what}"
            )


def _check_servable(router: Router) -> None:
    if router.depends_also_on:
        raise ConfigError(
            f"router {router.name} cannot be served: a token's experts depend on "
            f"{router.depends_also_on}, and a server's batches mix requests; use the folder's own "
            "code with transformers"
        )
    if router.free is not None and not router.free.all_zero:
        kinds = ", ".join(sorted(set(router.free.kinds) - {"zero"}))
        raise ConfigError(
            f"router {router.name} with {kinds} experts cannot be served: this server adds nothing "
            "to what its experts give; use the folder's own code with transformers"
        )
