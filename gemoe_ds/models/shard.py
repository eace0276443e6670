"""Which experts a rank keeps, and what it reads of a folder for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gemoe_ds.errors import ConfigError
from gemoe_ds.hf_io.allocator import WeightAllocator
from gemoe_ds.hf_io.loader import Weights
from gemoe_ds.hf_io.targets import PassedOn, Target
from gemoe_ds.models.blocks import BlockSpec, BlockWeights
from gemoe_ds.moe.dispatch import Dispatcher, LocalDispatcher
from gemoe_ds.moe.experts.module import Experts, QuantisedExperts
from gemoe_ds.moe.experts.quantised import QuantisedWeight


@dataclass(frozen=True)
class ExpertShard:
    """Which consecutive block of every layer's experts lives on this rank, and how to reach all."""

    rank: int = 0
    num_ranks: int = 1
    make_dispatcher: Callable[[], Dispatcher] = LocalDispatcher
    groups: Mapping[str, Any] = field(default_factory=dict)  # of ranks that it talks to, by name
    # Of the group's first rank.
    broadcast_from_first: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def local(self, num_experts: int) -> slice:
        if num_experts % self.num_ranks:
            fitting = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
            raise ConfigError(
                f"parallel.ep_size={self.num_ranks} does not divide the backbone's {num_experts} "
                f"experts; possible: {', '.join(map(str, fitting))}"
            )
        size = num_experts // self.num_ranks
        return slice(self.rank * size, (self.rank + 1) * size)


class StoredBlocks(BlockWeights):
    """This rank's shard; what is to be read from a folder is in `targets` by its stock name."""

    def __init__(
        self,
        shard: ExpertShard,
        dtype: torch.dtype,
        weights: Weights | None,
        blocks: Sequence[BlockSpec],
        memory: WeightAllocator,
    ) -> None:
        """Reads the gates, with which routers begin. Collective if the memory is common."""
        self.shard, self.dtype, self.weights = shard, dtype, weights
        self.targets: dict[str, Target] = {}
        self.gates: dict[str, Target] = {}

        if weights is not None:
            names = [f"{block.path}.{block.names[0]}" for block in blocks]
            shapes = {name: weights.shapes[name] for name in names}
            self.gates = {n: Target(torch.empty(shape), shape) for n, shape in shapes.items()}
            weights.fill(self.gates, memory)

    def gate(self, block: BlockSpec) -> Tensor:
        if self.weights is None:
            return block.gate_ED
        return self.gates.pop(f"{block.path}.{block.names[0]}").tensor

    def experts(self, block: BlockSpec) -> tuple[Tensor, Tensor]:
        local = self.shard.local(block.routing.num_experts)
        tensors = []
        for name, whole in zip(block.names[1:], super().experts(block), strict=True):
            mine = whole[local]
            if self.weights is not None:
                mine = torch.empty(mine.shape, dtype=self.dtype)
                self.targets[f"{block.path}.{name}"] = Target(mine, tuple(whole.shape), local.start)
            elif self.shard.num_ranks > 1:  # a copy, so that the experts of other ranks are freed
                mine = mine.clone()
            tensors.append(mine.to(self.dtype))
        gate_up_EGD, down_EDF = tensors
        return gate_up_EGD, down_EDF


class QuantisedBlocks(StoredBlocks):
    """The same in 8 or 4 bits, one of quantised.FORMATS: never more than a few slices in full."""

    def __init__(self, format_name: str, *of_blocks: Any) -> None:
        super().__init__(*of_blocks)
        self.format_name = format_name

    def make_experts(self, block: BlockSpec, *, trainable: bool, pack: bool) -> Experts:
        assert not (trainable or pack), "config/schema.py refuses it"
        local = self.shard.local(block.routing.num_experts)
        made = []
        for name, whole in zip(block.names[1:], BlockWeights.experts(self, block), strict=True):
            shape = tuple(whole.shape)
            if self.weights is None:
                made.append(QuantisedWeight.of(self.format_name, whole[local]))
                continue
            weight = QuantisedWeight(self.format_name, whole[local].shape)
            full = torch.empty(weight.shape, dtype=torch.float32, device="meta")
            self.targets[f"{block.path}.{name}"] = PassedOn(full, shape, local.start, weight=weight)
            made.append(weight)
        return QuantisedExperts(*made)


def stored_blocks(format_name: str | None, *of_blocks: Any) -> StoredBlocks:
    """With experts as they train or are stored, or quantised."""
    return QuantisedBlocks(format_name, *of_blocks) if format_name else StoredBlocks(*of_blocks)
