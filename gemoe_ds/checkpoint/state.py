"""Checkpoints of a run: its weights before and its optimizer after the engine is built.

Nothing in a checkpoint depends on the number of ranks, the expert-parallel size or the ZeRO stage,
so a run goes on with any other. The folder itself is manifest.py's, writing it writer.py's.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
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
from gemoe_ds.checkpoint.reading import TrainedTensors, read_together
from gemoe_ds.checkpoint.shards import StateShard, all_keys, by_parameter
from gemoe_ds.engine.read_once import peers_by
from gemoe_ds.engine.world import World, gather_objects
from gemoe_ds.engine.zero import MOMENTS, Engine, full_value, set_moments
from gemoe_ds.errors import CheckpointError
from gemoe_ds.hf_io.allocator import NO_PEERS, Peers
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


def load_trained(folder: Path) -> TrainedTensors:
    """The trained parameters of a checkpoint, each read when it is asked for."""
    return TrainedTensors(manifest.read(folder))


@torch.no_grad()
def load_trained_weights(model: MoEModel, folder: Path, world: World | None = None) -> None:
    """Load the trained parameters into a converted model that is not in an engine yet.

    Collective if there is a `world`, whose ranks then read each tensor once.
    """
    checkpoint = manifest.read(folder)
    _check_keys(model, checkpoint)
    pieces = [p for _, some in by_parameter(model) for p in some]
    rows = {p.key: p.of(p.parameter) for p in pieces if p.index is not None}
    dense = dict(model.router_state()) | {p.key: p.parameter for p in pieces if p.index is None}
    for key, into in (dense | rows).items():
        stored = tuple(checkpoint.manifest["tensors"][key]["shape"])
        if stored != tuple(into.shape):
            raise CheckpointError(
                f"{folder} does not fit this model: {key} is {stored} there, "
                f"{tuple(into.shape)} here"
            )
    with _peers(model, world) as peers:
        for wanted, some in zip((dense, rows), peers, strict=True):
            tensors = read_together(checkpoint, list(wanted), some)
            for into, tensor in zip(wanted.values(), tensors, strict=True):
                into.copy_(tensor)


@contextmanager
def _peers(model: MoEModel, world: World | None) -> Iterator[tuple[Peers, Peers]]:
    """The ranks that keep the same dense tensors, and the same experts. Collective."""
    if world is None:
        yield NO_PEERS, NO_PEERS
        return
    with peers_by(None, world) as all_ranks, peers_by(model.shard.rank, world) as copies:
        yield all_ranks, copies


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
    with _peers(model, world) as peers:
        set_moments(engine, _moments(model, checkpoint, peers), checkpoint.updates)
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
    model: MoEModel, checkpoint: Checkpoint, peers: tuple[Peers, Peers]
) -> Iterator[tuple[nn.Parameter, str, Tensor]]:
    """One after the other, as they are read. Collective."""
    every = list(by_parameter(model))
    by_kind: list[list[str]] = [[], []]
    for _, some in every:
        by_kind[_kind(some)] += [f"{moment}/{p.key}" for moment in MOMENTS for p in some]
    tensors = [read_together(checkpoint, *of_kind) for of_kind in zip(by_kind, peers, strict=True)]
    for parameter, some in every:
        for moment in MOMENTS:
            found = [next(tensors[_kind(some)]) for _ in some]
            yield parameter, moment, torch.stack(found) if _kind(some) else found[0]


def _kind(pieces: list[StateShard]) -> int:
    """0: a dense parameter; 1: rows of experts."""
    return int(pieces[0].index is not None)


def _check_keys(model: MoEModel, checkpoint: Checkpoint) -> None:
    expected, stored = all_keys(model) | set(model.router_state()), checkpoint.keys(WEIGHTS)
    if expected != stored:
        key = min(expected ^ stored)
        where = "is not in it" if key in expected else "is not in this model"
        raise CheckpointError(
            f"{checkpoint.folder} does not fit this model: {len(expected ^ stored)} tensors "
            f"differ; {key} {where}"
        )
