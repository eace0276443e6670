"""Expert parallelism: which ranks share one set of experts, and the all-to-all between them.

Frozen experts are buffers, of which DeepSpeed knows nothing. Trainable ones over several ranks
are parameters that only the ranks with the same shard may average: DeepSpeed's engine does that
if a module of its class `AutoEPMoELayer` is present and the parameters are marked. The class
`_ExpertsArePresent` is such a module and nothing more: it holds no weights and computes nothing.
"""

from __future__ import annotations

from typing import Any

import deepspeed.comm as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor, nn

from gemoe_ds.engine.world import World, waiting
from gemoe_ds.errors import ConfigError
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.moe.all_to_all import AsyncWork
from gemoe_ds.moe.dispatch import AllToAllDispatcher
from gemoe_ds.progress import PROGRESS

SHARING_EXPERTS = "sharing experts"  # the name of the one group that exchanges rows


def expert_shard(ep_size: int, world: World, *, trainable: bool = False) -> ExpertShard:
    """The shard of this rank: consecutive ranks form groups of `ep_size`, inside a node if it fits.

    Collective: every rank must call it.
    """
    if world.size % ep_size:
        raise ConfigError(
            f"parallel.ep_size={ep_size} does not divide the {world.size} ranks of this run"
        )
    if ep_size == 1:
        return ExpertShard()
    rank = world.rank % ep_size
    group = expert_parallel_group(ep_size) if trainable else _new_group(ep_size, world)
    groups = {SHARING_EXPERTS: group}
    if trainable and world.size > ep_size:
        groups["with equal experts"] = equal_experts_group(ep_size)

    def all_to_all(
        output: Tensor, rows: Tensor, output_splits: list[int], input_splits: list[int]
    ) -> AsyncWork:
        PROGRESS.wait_for("all_to_all")
        work: AsyncWork = dist.all_to_all_single(
            output, rows, output_splits, input_splits, group=group, async_op=True
        )
        return work

    def broadcast_from_first(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        with waiting("broadcast"):
            dist.broadcast(copy, world.rank - rank, group=group)
        return copy

    return ExpertShard(
        rank,
        ep_size,
        lambda: AllToAllDispatcher(all_to_all, rank, ep_size),
        groups,
        broadcast_from_first,
    )


def _new_group(ep_size: int, world: World) -> Any:
    """Frozen experts need no gradient, so the ranks that hold the same shard form no group."""
    group = None
    for first in range(0, world.size, ep_size):  # every rank must create every group
        ranks = list(range(first, first + ep_size))
        created = dist.new_group(ranks)
        if world.rank in ranks:
            group = created
    return group


def expert_group_name(ep_size: int) -> str:
    """DeepSpeed's name of the groups, and of the optimizer group of the experts."""
    return f"ep_size_{ep_size}"


def expert_parallel_group(ep_size: int) -> Any:
    """DeepSpeed's group of consecutive ranks that together hold all experts; made if need be."""
    name = expert_group_name(ep_size)
    if name not in deepspeed_groups._get_expert_parallel_group_dict():
        deepspeed_groups._create_expert_and_data_parallel(ep_size)
    return deepspeed_groups._get_expert_parallel_group(name)


def equal_experts_group(ep_size: int) -> Any:
    """DeepSpeed's group of the ranks that hold the same shard, which average its gradients."""
    return deepspeed_groups._get_expert_data_parallel_group(expert_group_name(ep_size))


def mark_trainable_experts(model: MoEModel) -> None:
    """Before `deepspeed.initialize`: sharded experts are averaged among equal shards only."""
    ep_size = model.shard.num_ranks
    experts = model.sharded_parameters()
    if not experts:
        return
    for parameter in experts.values():
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = expert_group_name(ep_size)  # type: ignore[attr-defined]
        parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
        parameter.ds_zero_partition_group_name = expert_group_name(ep_size)  # type: ignore[attr-defined]
    model.experts_are_present = _ExpertsArePresent(model.routing[0].num_experts, ep_size)


class _ExpertsArePresent(AutoEPMoELayer):  # type: ignore[misc]  # deepspeed has no types
    """What the engine asks of an AutoEP layer when it is built, without the layer."""

    def __init__(self, num_experts: int, ep_size: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts
        self.ep_size = ep_size

    def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
        expert_parallel_group(self.ep_size)

    def forward(self, *_: Any) -> None:
        raise AssertionError("this module only marks; the experts are in the MoE layers")
