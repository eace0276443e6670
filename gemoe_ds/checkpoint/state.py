"""Checkpoints of a run: its weights before and its optimizer after the engine is built.

Nothing in a checkpoint depends on the number of ranks, the expert-parallel size or the ZeRO stage,
so a run goes on with any other. The folder itself is manifest.py's, writing it writer.py's.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemoe_ds.checkpoint import manifest
from gemoe_ds.checkpoint.manifest import (
    ADAM,
    WEIGHTS,
    Checkpoint,
)
from gemoe_ds.checkpoint.shards import StateShard, all_keys, by_parameter, stacked
from gemoe_ds.engine.world import World, gather_objects
from gemoe_ds.engine.zero import MOMENTS, Engine, full_value, set_moments
from gemoe_ds.errors import CheckpointError
from gemoe_ds.models.moe_model import MoEModel


def find_together(
    resume: str, output: Path, identity: dict[str, Any], world: World
) -> tuple[Checkpoint | None, list[str]]:
    """`manifest.find` with the files to verify divided among the ranks. Collective.

    All ranks get the same answer, or the same CheckpointError.
    """
    first = manifest.candidates(output) if world.is_first else []
    folders = gather_objects(first)[0]

    def check(folder: Path) -> Checkpoint:
        try:
            checkpoint, failure = manifest.verify(folder, (world.rank, world.size)), None
        except CheckpointError as error:
            checkpoint, failure = None, str(error)
        failures = [f for f in gather_objects(failure) if f]
        if failures:
            raise CheckpointError(failures[0])
        assert checkpoint is not None
        return checkpoint

    return manifest.find(resume, output, identity, check, folders)


def load_trained(folder: Path) -> dict[str, Tensor]:
    """The trained parameters of a checkpoint, float32 on the CPU, by name; experts stacked."""
    return stacked(manifest.read(folder).tensors(WEIGHTS))


@torch.no_grad()
def load_trained_weights(model: MoEModel, folder: Path) -> None:
    """Load the trained parameters into a converted model that is not in an engine yet."""
    checkpoint = manifest.read(folder)
    _check_keys(model, checkpoint)
    wanted: dict[str, Tensor] = dict(model.router_state())
    wanted |= {p.key: p.of(p.parameter) for _, some in by_parameter(model) for p in some}
    for key, tensor in checkpoint.tensors(WEIGHTS, set(wanted)):
        into = wanted[key]
        if into.shape != tensor.shape:
            raise CheckpointError(
                f"{folder} does not fit this model: {key} is {tuple(tensor.shape)} there, "
                f"{tuple(into.shape)} here"
            )
        into.copy_(tensor)


def load_optimizer_state(
    engine: Engine, model: MoEModel, checkpoint: Checkpoint, world: World
) -> None:
    """Adam's moments, its count of updates and the schedule; the weights are there already.

    Checks by checksum that the engine has kept the weights that were loaded. Collective.
    """
    _check_engine(model, checkpoint, world)
    wanted = [p.key for _, some in by_parameter(model) for p in some]
    missing = {f"{moment}/{key}" for moment in MOMENTS for key in wanted} - checkpoint.keys(ADAM)
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder}: no {min(missing)} there; use another checkpoint"
        )
    with checkpoint.reading() as read:
        set_moments(engine, _moments(model, read), checkpoint.updates)
    scheduler = engine.lr_scheduler
    scheduler.last_epoch = checkpoint.updates
    for group, base, factor in zip(
        engine.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(checkpoint.updates)
    engine.global_steps = checkpoint.step * model.updates_per_batch
    engine.skipped_steps = engine.global_steps - checkpoint.updates


def _check_engine(model: MoEModel, checkpoint: Checkpoint, world: World) -> None:
    """Of the ranks that hold a piece each looks at a part of them; all raise. Collective."""
    entries, wrong = checkpoint.manifest["tensors"], None
    copies, number = world.size // model.shard.num_ranks, world.rank // model.shard.num_ranks
    for parameter, some in by_parameter(model):
        value = full_value(parameter)
        every, mine = (world.size, world.rank) if some[0].index is None else (copies, number)
        for piece in some:
            if zlib.crc32(piece.key.encode()) % every == mine:
                found = manifest.sha256(piece.of(value).to("cpu", torch.float32))
                wrong = wrong or (piece.key if found != entries[piece.key]["sha256"] else None)
    for key in filter(None, gather_objects(wrong)):
        raise CheckpointError(f"{checkpoint.folder}: the engine holds another {key}")


def _moments(
    model: MoEModel, read: Callable[[str], Tensor]
) -> Iterator[tuple[nn.Parameter, str, Tensor]]:
    """One after the other, as they are read."""
    for parameter, some in by_parameter(model):
        for moment in MOMENTS:
            yield parameter, moment, _joined([read(f"{moment}/{p.key}") for p in some], some)


def _joined(tensors: list[Tensor], some: list[StateShard]) -> Tensor:
    return tensors[0] if some[0].index is None else torch.stack(tensors)


def _check_keys(model: MoEModel, checkpoint: Checkpoint) -> None:
    expected, stored = all_keys(model) | set(model.router_state()), checkpoint.keys(WEIGHTS)
    if expected != stored:
        key = min(expected ^ stored)
        where = "is not in it" if key in expected else "is not in this model"
        raise CheckpointError(
            f"{checkpoint.folder} does not fit this model: {len(expected ^ stored)} tensors "
            f"differ; {key} {where}"
        )
