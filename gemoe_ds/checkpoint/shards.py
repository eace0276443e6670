"""What a checkpoint stores: every parameter that trains, by a name that no parallelism changes.

A layer's experts are stored one by one under their GLOBAL number, so that any expert-parallel size
can read what any other wrote: `...experts.17.gate_up_GD` is expert 17 of `...experts.gate_up_EGD`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from gemoe_ds.models.moe_model import MoEModel

_EXPERT_KEY = re.compile(r"^(.*\.experts)\.(\d+)\.(\w+)_([A-Z]+)$")


@dataclass(frozen=True)
class StateShard:
    """One stored tensor: a whole parameter, or one of its experts (`index` within this rank)."""

    key: str
    parameter: nn.Parameter
    index: int | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The part of the parameter's value, or of its moment, that this piece is."""
        return tensor if self.index is None else tensor[self.index]


def state_shards(model: MoEModel) -> dict[str, list[StateShard]]:
    """This rank's pieces by the name of their parameter; equal names and order on all ranks."""
    experts = {id(p): layer for layer in model.moe_layers for p in layer.experts.parameters()}
    found: dict[str, list[StateShard]] = {}
    for name, parameter in model.trainable().items():
        layer = experts.get(id(parameter))
        if layer is None:
            found[name] = [StateShard(name, parameter)]
            continue
        count = layer.router.spec.num_experts // model.shard.num_ranks
        first = model.shard.rank * count
        found[name] = [StateShard(expert_key(name, first + i), parameter, i) for i in range(count)]
    return found


def expert_key(name: str, expert: int) -> str:
    """`x.experts.gate_up_EGD`, 17 -> `x.experts.17.gate_up_GD`."""
    path, leaf = name.rsplit(".", 1)
    stem, shape = leaf.rsplit("_", 1)
    assert shape.startswith("E"), f"{name}: the first dimension of an expert parameter is E"
    return f"{path}.{expert}.{stem}_{shape[1:]}"


def all_keys(model: MoEModel) -> set[str]:
    """The keys of all ranks together."""
    keys = set()
    for name, some in state_shards(model).items():
        if some[0].index is None:
            keys.add(name)
        else:
            total = len(some) * model.shard.num_ranks
            keys |= {expert_key(name, expert) for expert in range(total)}
    return keys


def pieces_of(keys: Iterable[str]) -> dict[str, list[str]]:
    """The keys of each parameter, by its name; those of a layer's experts in their order."""
    numbered: dict[str, dict[int, str]] = {}
    for key in sorted(keys):
        if match := _EXPERT_KEY.match(key):
            path, number, stem, shape = match.groups()
            numbered.setdefault(f"{path}.{stem}_E{shape}", {})[int(number)] = key
        else:
            numbered[key] = {0: key}
    return {name: [some[n] for n in range(len(some))] for name, some in numbered.items()}


def by_parameter(model: MoEModel) -> Iterator[tuple[nn.Parameter, list[StateShard]]]:
    """Each parameter with its pieces, in the order that all ranks share."""
    for some in state_shards(model).values():
        yield some[0].parameter, some
