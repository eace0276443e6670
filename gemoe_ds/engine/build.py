"""A converted model in a DeepSpeed engine: parameter groups, AdamW, schedule, checks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from torch import nn

from gemoe_ds.config import OptimConfig, RunConfig, deepspeed_config
from gemoe_ds.engine.compile import compile_dense
from gemoe_ds.engine.gemm import choose_grouped_gemm
from gemoe_ds.engine.groups import (
    expert_group_name,
    expert_parallel_group,
    mark_trainable_experts,
)
from gemoe_ds.engine.optimizer import GlobalNormAdamW
from gemoe_ds.engine.world import World
from gemoe_ds.engine.zero import Engine, create_moments, full_shape, full_value, is_held
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.moe.experts.quantised import QuantisedWeight

# Names that torch has given up and DeepSpeed calls in every step; nothing that a user can change.
_OLD_NAMES = ("all_gather_into_tensor", "reduce_scatter_tensor")


def initialize(
    model: MoEModel, config: RunConfig, world: World, *, may_write: bool = True
) -> Engine:
    """The engine, checked: every parameter that trains is in its optimizer, and no other. Unless it
    `may_write` DeepSpeed's own monitors are off.

    With frozen experts DeepSpeed sees an ordinary dense model: they are buffers, and no
    `expert_parallel` section exists. It runs in float32 mode (no `bf16` section): the frozen part
    is stored in `model.dtype` and what trains is float32.
    """
    mark_trainable_experts(model)
    choose_grouped_gemm(model, world.device)
    if config.model.compile == "dense":
        compile_dense(model)
    groups = parameter_groups(model, config.optim)
    options: dict[str, Any] = {key: getattr(config.optim, key) for key in ("lr", "betas", "eps")}
    optimizer: torch.optim.Optimizer
    if config.zero_stage == 0:
        optimizer = own = GlobalNormAdamW(
            groups, max_grad_norm=config.optim.max_grad_norm, **options
        )
        if model.sharded_parameters():
            own.expert_group = expert_parallel_group(model.shard.num_ranks)
    else:
        optimizer = torch.optim.AdamW(groups, **options)
    for name in _OLD_NAMES:
        warnings.filterwarnings("ignore", rf"`torch\.distributed\.{name}`", FutureWarning)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=lambda opt: torch.optim.lr_scheduler.LambdaLR(
            opt, schedule(config.optim, config.num_steps, model.updates_per_batch)
        ),
        config=deepspeed_config(config, world.size, model.routing[0].d_model, may_write=may_write),
    )
    check_optimizer_holds(engine, model)
    create_moments(engine)
    return engine


def parameter_groups(model: MoEModel, optim: OptimConfig) -> list[dict[str, Any]]:
    """Named groups: those of `Router.param_groups`, and `backbone`.

    Experts that are sharded over ranks stand apart, under the name that DeepSpeed wants.
    """
    group_of = {
        id(p): group
        for layer in model.moe_layers
        for group, params in layer.router.param_groups().items()
        for p in params
    }
    sharded = {id(p) for p in model.sharded_parameters().values()}
    experts = expert_group_name(model.shard.num_ranks)
    members: dict[str, list[nn.Parameter]] = {"router": [], "predictor": [], "backbone": []}
    for parameter in model.trainable().values():
        group = experts if id(parameter) in sharded else group_of.get(id(parameter), "backbone")
        members.setdefault(group, []).append(parameter)
    groups = []
    for name, params in members.items():
        if params:
            lr = optim.predictor_lr if name == "predictor" and optim.predictor_lr else optim.lr
            options = {"name": name, "params": params, "lr": lr, "weight_decay": optim.weight_decay}
            groups.append(options | ({"moe": True} if name == experts else {}))
    return groups


def title_of(group: dict[str, Any]) -> str:
    """What a reader calls a group: sharded experts bear the name that DeepSpeed wants."""
    return "experts" if group.get("moe") else str(group["name"])


def schedule(optim: OptimConfig, steps: int, updates_per_step: int = 1) -> Callable[[int], float]:
    """Factor of the learning rate at an update counted from 0: linear warm-up, then cosine or flat.

    The updates of one step have one rate. The first step already has a rate above 0, and the last
    one still has.
    """
    warmup = optim.warmup_steps

    def factor(update: int) -> float:
        step = update // updates_per_step
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if optim.schedule == "constant":
            return 1.0
        progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * cosine

    return factor


def check_optimizer_holds(engine: Engine, model: MoEModel) -> None:
    """Stop if the optimizer does not hold a parameter that trains.

    A parameter that the optimizer lost keeps its value while the loss still falls: the worst kind
    of failure. Collective: every rank must call it.
    """
    lost = [name for name, parameter in model.trainable().items() if not is_held(engine, parameter)]
    if lost:
        raise RuntimeError(
            f"the optimizer does not hold {len(lost)} trainable parameters: {lost[:3]}"
        )


def group_summary(model: MoEModel, optim: OptimConfig) -> str:
    """Counts per optimizer group and of what is frozen, with its precision, one line each."""
    lines, trained = [], 0
    for group in parameter_groups(model, optim):
        ranks = model.shard.num_ranks if group.get("moe") else 1
        count = sum(math.prod(full_shape(p)) for p in group["params"]) * ranks
        trained += count
        lines.append(
            f"  {title_of(group):<9} {count:>13,} parameters in {len(group['params'])} tensors, "
            f"lr {group['lr']:g}"
        )
    total = model.num_parameters + model.num_added_parameters
    frozen = {
        str(p.dtype).removeprefix("torch.") for p in model.parameters() if not p.requires_grad
    }
    frozen |= {part.name for part in model.modules() if isinstance(part, QuantisedWeight)}
    kept = f"parameters in {' and '.join(sorted(frozen))}" if frozen else "parameters"
    return "\n".join([*lines, f"  {'frozen':<9} {total - trained:>13,} {kept}"])


class MovedCheck:
    """After the first step every optimizer group must have moved; holds copies until then.

    Collective under ZeRO 3, both to make and to check.
    """

    def __init__(self, model: MoEModel, optim: OptimConfig) -> None:
        self._before = {
            group["name"]: [(p, full_value(p).clone()) for p in group["params"]]
            for group in parameter_groups(model, optim)
        }

    def check(self) -> None:
        """Raise RuntimeError naming a group none of whose parameters changed; call it once."""
        for name, pairs in self._before.items():
            if all([torch.equal(full_value(p), before) for p, before in pairs]):
                raise RuntimeError(
                    f"after the first step no parameter of group {name!r} has moved: "
                    "it has no gradient, or the optimizer does not hold it"
                )
        self._before.clear()
