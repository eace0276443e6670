"""One view of parameters, gradients and Adam's state, whatever the ZeRO stage.

The only file that knows where DeepSpeed keeps its master copies. Public functions of
deepspeed.utils serve where they reach; the few inner names beside them (in `flat_partitions` and
`create_moments`) are held by tests/engine/test_zero.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

Engine = Any  # deepspeed.DeepSpeedEngine
MOMENTS = ("exp_avg", "exp_avg_sq")


def full_value(parameter: Tensor) -> Tensor:
    """The value of a parameter, float32 if it trains. Collective under ZeRO 3."""
    if _stage_3(parameter):
        if parameter.requires_grad:
            return safe_get_full_fp32_param(parameter).detach()
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()  # what trains is float32, so the parameter is its own master copy


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter; ZeRO 3 leaves an empty tensor in its place between steps."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_held(engine: Engine, parameter: nn.Parameter) -> bool:
    """Whether the optimizer holds this parameter and will update it. Collective."""
    if engine.zero_optimization():
        return safe_get_full_fp32_param(parameter) is not None
    return any(parameter is p for g in engine.optimizer.param_groups for p in g["params"])


@torch.no_grad()
def assign_(parameter: Tensor, value: Tensor) -> None:
    """Write `value` into the parameter AND its master copy, so that no step undoes it.

    Under ZeRO 1 and 2 the next step overwrites the parameter with the master; writing only the
    parameter is lost silently. Collective: every rank must call it with the same value.
    """
    value = value.to(torch.float32)
    if _stage_3(parameter):
        own: Any = parameter  # to which DeepSpeed has given attributes
        mine = _my_part(own, value)
        safe_set_local_fp32_param(parameter, mine)
        # What the next forward gathers from, else stale until the next step.
        own.ds_tensor.data.copy_(mine.view_as(own.ds_tensor))
        if parameter.shape == value.shape:  # small ones stay gathered all the time
            parameter.data.copy_(value)
        return
    parameter.copy_(value)
    if hasattr(parameter, "_hp_mapping"):
        safe_set_full_fp32_param(parameter, value)


def full_moment(engine: Engine, parameter: nn.Parameter, name: str) -> Tensor:
    """Adam's `exp_avg` or `exp_avg_sq` of a parameter, float32. Collective under ZeRO."""
    if engine.zero_optimization():
        return safe_get_full_optimizer_state(parameter, name).detach()
    state: Tensor = engine.optimizer.state[parameter][name]
    return state


@torch.no_grad()
def create_moments(engine: Engine) -> None:
    """Adam's state before its first step, which would else make it as it goes.

    Memory that is missing is missed at the start. And ZeRO 1 and 2 link parameters to their
    moments once, after the first optimizer GROUP has stepped: those of the others, which do not
    exist by then, could never be read.
    """
    if not engine.zero_optimization():
        for group in engine.optimizer.param_groups:
            for parameter in group["params"]:
                engine.optimizer.state[parameter] = _fresh_state(parameter)
        return
    for flat in flat_partitions(engine):
        engine.optimizer.optimizer.state[flat] = _fresh_state(flat)
    if engine.zero_optimization_stage() < 3:
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _fresh_state(flat: Tensor) -> dict[str, Tensor]:
    """The state of one parameter as AdamW.state_dict lays it out.

    Each has a `step` of its own: AdamW would advance a shared one once for every parameter.
    """
    return {"step": torch.tensor(0.0)} | {name: torch.zeros_like(flat) for name in MOMENTS}


@torch.no_grad()
def set_moments(
    engine: Engine, moments: Iterable[tuple[nn.Parameter, str, Tensor]], num_updates: int
) -> None:
    """Adam's state as it was after `num_updates` steps; every parameter must come once a moment."""
    inner = engine.optimizer.optimizer if engine.zero_optimization() else engine.optimizer
    for state in inner.state.values():
        state["step"].fill_(num_updates)
    for parameter, name, value in moments:
        if _stage_3(parameter):
            safe_set_local_optimizer_state(parameter, _my_part(parameter, value), name)
        elif engine.zero_optimization():
            safe_set_full_optimizer_state(parameter, value, name)
        else:
            inner.state[parameter][name].copy_(value)


def flat_partitions(engine: Engine) -> list[Tensor]:
    """This rank's flat float32 partitions, which are what the inner AdamW updates."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    return list(optimizer.single_partition_of_fp32_groups)


def _my_part(parameter: Any, value: Tensor) -> Tensor:
    """This rank's part of a value, padded at the end like ZeRO 3's own.

    The public setters for full values do not pad: they fail unless the ranks divide the size.
    """
    size = parameter.ds_tensor.ds_numel
    start = dist.get_rank(group=parameter.ds_process_group) * size
    return nn.functional.pad(value.flatten().float(), (0, size))[start : start + size]


def _stage_3(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")
