"""What routers do after an optimizer step, where no Trainer of gemoe_ds does it for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from gemoe_ds.moe.experts.module import Experts
from gemoe_ds.moe.router import Router
from gemoe_ds.moe.step_context import Assign, Read, StepContext
from gemoe_ds.moe.step_counts import StepCounts

Layers = Sequence[tuple[Router, Experts]]


def before_steps(layers: Layers) -> None:
    """Once, before the first step."""
    for router, experts in layers:
        router.before_steps(experts, _read, _same)


def after_step(
    layers: Layers,
    counts: StepCounts,
    step: int,
    total_steps: int,
    assign_: Assign | None,
    read_param: Read | None,
) -> None:
    """Sum the counts over the ranks, and let every router see them. Collective."""
    if not 1 <= step <= total_steps:
        raise ValueError(f"step={step}: from 1 to total_steps={total_steps}, counted from 1")
    of_layers, of_model = counts.reduced(_sum_over_ranks)
    for (router, experts), sums in zip(layers, of_layers, strict=True):
        router.after_step(
            StepContext(
                step=step,
                total_steps=total_steps,
                layer=sums,
                model=of_model,
                assign_=assign_ or _assign_,
                read_param=read_param or _read,
                experts=experts,
            )
        )


def _sum_over_ranks(tensor: Tensor) -> None:
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(tensor)


@torch.no_grad()
def _assign_(parameter: Tensor, value: Tensor) -> None:
    _refuse_master_copies(parameter)
    parameter.copy_(value)


def _read(parameter: Tensor) -> Tensor:
    _refuse_master_copies(parameter)
    return parameter.detach()


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _refuse_master_copies(parameter: Tensor) -> None:
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        raise RuntimeError(
            "after_step(): DeepSpeed's ZeRO has a copy of this parameter, which undoes what is "
            "written here; give assign_=gemoe_ds.engine.zero.assign_ and "
            "read_param=gemoe_ds.engine.zero.full_value"
        )
