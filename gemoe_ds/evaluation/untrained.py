"""Routers that route without training: those of --router, and what is asked of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gemoe_ds.config.load import parse_yaml
from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.router import Router, RoutingSpec
from gemoe_ds.moe.score_rule import ScoreRule
from gemoe_ds.registry import ConfigModel

Chosen = tuple[type[Router], ConfigModel]  # a router's class and options
_SPEC = RoutingSpec(d_model=8, num_experts=64, top_k=8, norm_topk_prob=False)


def choose(given: Iterable[str | Mapping[str, Any]]) -> dict[str, Chosen]:
    """By name: "score", "{name: score, k_low: 2}", or the same as a mapping.

    Raises ConfigError for an unknown name or option, a name that stands twice, and a router with
    weights of its own.
    """
    found: dict[str, Chosen] = {}
    for one in given:
        tree = parse_yaml(one, f"--router {one}: not YAML") if isinstance(one, str) else one
        tree = {"name": tree} if isinstance(tree, str) else tree
        if not isinstance(tree, Mapping) or not isinstance(tree.get("name"), str):
            raise ConfigError(
                f"--router {one!r:.60}: give a name, or a mapping with a name: "
                "'{name: score, k_low: 2}'"
            )
        options = {option: value for option, value in tree.items() if option != "name"}
        router, config = Router.configured(tree["name"], options)
        if not routes_untrained(router, config):
            able = [r.name for r in Router.known() if routes_untrained(r, r.Config())]
            raise ConfigError(
                f"--router {router.name}: has to be trained before it routes; give a run that did "
                f"as --trained RUN without --router, or one of {', '.join(able)}"
            )
        if router.name in found:
            raise ConfigError(
                f"--router {router.name}: stands twice; evaluate its options one after the other"
            )
        found[router.name] = router, config
    return found


def routes_untrained(router: type[Router], config: ConfigModel) -> bool:
    """Whether it chooses by the gate, and holds nothing beside it that training has found."""
    with torch.random.fork_rng(devices=[]):
        try:
            probe = router(config, _SPEC)
        except ConfigError:  # of sizes that are not the model's: it will say so of these
            return True
    return probe.gate.weight.requires_grad and len(probe.state_dict()) == 1


def is_rule(router: Router) -> bool:
    """Whether it is a rule on the gate's scores, and has found nothing in training."""
    return isinstance(router, ScoreRule) and len(router.state_dict()) == 1


@torch.no_grad()
def on_gates(
    chosen: Chosen, gates: Sequence[Tensor], routing: Sequence[RoutingSpec]
) -> list[Router]:
    """A router for every layer, with a copy of its gate."""
    router_class, config = chosen
    routers = []
    for gate_ED, spec in zip(gates, routing, strict=True):
        routers.append(router_class(config, spec))
        routers[-1].adopt_gate(gate_ED)
    return routers
