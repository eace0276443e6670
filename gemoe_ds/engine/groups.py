"""Expert parallelism: which ranks share one set of experts, and the all-to-all between them."""

from __future__ import annotations

import deepspeed.comm as dist
from torch import Tensor

from gemoe_ds.backbones.model import ExpertShard
from gemoe_ds.engine.distributed import World
from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.dispatch import AllToAllDispatcher


def expert_shard(ep_size: int, world: World) -> ExpertShard:
    """The shard of this rank: consecutive ranks form groups of `ep_size`, inside a node if it fits.

    Frozen experts need no gradient, so the ranks that hold the same shard form no group.
    """
    if world.size % ep_size:
        raise ConfigError(
            f"parallel.ep_size={ep_size} does not divide the {world.size} ranks of this run"
        )
    if ep_size == 1:
        return ExpertShard()
    group = None
    for first in range(0, world.size, ep_size):  # every rank must create every group
        ranks = list(range(first, first + ep_size))
        created = dist.new_group(ranks)
        if world.rank in ranks:
            group = created
    rank = world.rank % ep_size

    def all_to_all(
        output: Tensor, rows: Tensor, output_splits: list[int], input_splits: list[int]
    ) -> None:
        dist.all_to_all_single(output, rows, output_splits, input_splits, group=group)

    return ExpertShard(rank, ep_size, lambda: AllToAllDispatcher(all_to_all, rank, ep_size))
