"""Saves checkpoints while training goes on.

`save` copies what this rank owns to host memory (all that training waits for) and leaves the
writing to a thread. Each rank writes its own files and then a note of what is in them; what
follows until all of them are a checkpoint is commit.py's. The threads use no collectives: those
stay in one order, the trainer's.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from gemoe_ds.checkpoint import manifest
from gemoe_ds.checkpoint.commit import Stages, check_part, commit_parts, note_of
from gemoe_ds.checkpoint.manifest import ADAM, WEIGHTS
from gemoe_ds.checkpoint.shards import by_parameter
from gemoe_ds.engine.world import World, gather_objects
from gemoe_ds.engine.zero import MOMENTS, Engine, full_moment, full_value
from gemoe_ds.errors import CheckpointError
from gemoe_ds.files import fsync_path, write_text
from gemoe_ds.models.moe_model import MoEModel

SHARD_BYTES = 2**30  # of replicated weights that one rank writes before it is the next one's turn


class Saver:
    """Saves into `output`/checkpoints. Every rank makes one and calls its methods together."""

    def __init__(
        self,
        engine: Engine,
        model: MoEModel,
        output: Path,
        identity: dict[str, Any],
        world: World,
        *,
        keep: int,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.engine, self.model, self.world = engine, model, world
        self.root = output / "checkpoints"
        self.identity, self.extra, self.keep = identity, extra or {}, keep
        self.root.mkdir(parents=True, exist_ok=True)
        self._place = _place(self.root)
        self.last: Path | None = None
        self._writing: _Job | None = None
        self._checking: _Job | None = None
        self._committing: _Job | None = None
        self._stages = Stages()
        self._owners = owners(model, world)
        self._token = gather_objects(secrets.token_hex(4))[0]

    def save(
        self,
        step: int,
        updates: int,
        empty_steps: int = 0,
        *,
        hooks: dict[str, dict[str, Any]] | None = None,
        is_best: bool = False,
    ) -> None:
        """Start saving; waits for an earlier save to end first. Collective.

        `hooks`: what those of the run remember, by their names; the first rank's are kept. The
        newest one that `is_best` stays beside the `keep` newest of all.
        """
        self.wait()
        weights, adam = self._snapshot()
        final = self.root / f"step-{step:06d}"
        temporary = self.root / f"{manifest.WRITING}{final.name}-{self._token}"
        header = self.extra | {
            "schema": manifest.SCHEMA,
            "step": step,
            "updates": updates,
            "empty_steps": empty_steps,
            "hooks": hooks or {},
            "identity": self.identity,
        }
        self.last = final
        self._stages = stages = Stages()
        writers = sorted(self._owners.ranks)
        if self.world.rank in writers:
            self._writing = writing = _Job(lambda: self._write(temporary, weights, adam))
            share = writers.index(self.world.rank), len(writers)
            self._checking = _Job(
                lambda: None if writing.join() else check_part(temporary, share, stages)
            )
        if self.world.is_first:
            self._committing = _Job(
                lambda: commit_parts(
                    temporary, final, writers, header, self.keep, is_best=is_best, stages=stages
                )
            )

    def _write(self, temporary: Path, weights: dict[str, Tensor], adam: dict[str, Tensor]) -> None:
        """Never into a new folder under the old name: the older checkpoints are not in it."""
        if _place(self.root) != self._place:
            raise OSError(f"{self.root} is not the folder any more that the run began in")
        write_part(temporary, self.world.rank, weights, adam)

    def wait(self) -> Path | None:
        """Wait until the save under way, if any, is on disk; the newest checkpoint. Collective.

        Raises CheckpointError on all ranks if any of them could not write; older checkpoints stay.
        """
        if self.last is None:
            return None
        self._raise_together(self._writing)
        self._stages.all_written.set()
        self._raise_together(self._checking)
        self._stages.all_checked.set()
        self._raise_together(self._committing)
        self._writing = self._checking = self._committing = None
        return self.last

    def _raise_together(self, job: _Job | None) -> None:
        failures = [f for f in gather_objects(job.join() if job else None) if f]
        if failures:
            self._stages.cancel.set()
            for other in (self._checking, self._committing):
                if other:
                    other.join()
            self.last = self._writing = self._checking = self._committing = None
            if self.world.is_first:
                manifest.clean(self.root.parent)
            raise CheckpointError(failures[0])

    def finish_alone(self) -> None:
        """On the way out after an error: let a save under way end, without the other ranks."""
        for job in (self._writing, self._checking):
            if job and job.join(timeout=30.0):
                self._stages.cancel.set()  # what this rank could not write will never be whole
        if self._committing:
            self._committing.join(timeout=30.0)

    def _snapshot(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What this rank owns, copied; every rank takes part, for ZeRO gathers across them."""
        weights: dict[str, Tensor] = {}
        adam: dict[str, Tensor] = {}
        for parameter, pieces in by_parameter(self.model):
            mine = [p for p in pieces if self._owners.by_key[p.key] == self.world.rank]
            value = full_value(parameter)
            weights |= {p.key: _copied(p.of(value)) for p in mine}
            for moment in MOMENTS:
                value = full_moment(self.engine, parameter, moment)
                adam |= {f"{moment}/{p.key}": _copied(p.of(value)) for p in mine}
        for name, state in self.model.router_state().items():
            value = full_value(state)
            if self.world.is_first:
                weights[name] = _copied(value)
        return weights, adam


def write_part(
    temporary: Path, rank: int, weights: dict[str, Tensor], adam: dict[str, Tensor]
) -> None:
    """The files of one rank, and then its note of what is in them."""
    temporary.mkdir(parents=True, exist_ok=True)
    entries: dict[str, Any] = {}
    for kind, tensors in ((WEIGHTS, weights), (ADAM, adam)):
        if tensors:
            name = f"{kind}-{rank:05d}.safetensors"
            save_file(tensors, temporary / name)
            fsync_path(temporary / name)
            entries |= manifest.describe(tensors, name)
    write_text(temporary / note_of(rank), json.dumps(entries, indent=1))


@dataclass(frozen=True)
class Owners:
    """The rank that writes each of this rank's pieces, and all ranks that write anything."""

    by_key: dict[str, int]
    ranks: set[int]


def owners(model: MoEModel, world: World) -> Owners:
    """Replicated pieces go to the ranks in turn by size, experts to a rank that holds them."""
    by_key: dict[str, int] = {}
    ranks: set[int] = {0}  # the routers' state is its to write
    ep_size = model.shard.num_ranks
    copies = world.size // ep_size  # ranks that hold the same experts
    replicated_bytes = turn = 0
    for parameter, pieces in by_parameter(model):
        if ep_size > 1 and pieces[0].index is not None:
            first = (turn % copies) * ep_size
            turn += 1
            ranks |= set(range(first, first + ep_size))
            by_key |= dict.fromkeys((p.key for p in pieces), first + model.shard.rank)
        else:
            writer = (replicated_bytes // SHARD_BYTES) % world.size
            replicated_bytes += 4 * getattr(parameter, "ds_numel", parameter.numel())
            ranks.add(writer)
            by_key |= dict.fromkeys((p.key for p in pieces), writer)
    return Owners(by_key, ranks)


class _Job:
    """A function in a thread, and what went wrong in it."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.failure: str | None = None
        # A daemon: a process that ends on an error does not wait for ranks that are gone.
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[[], None]) -> None:
        try:
            function()
        except CheckpointError as error:
            self.failure = str(error)
        except Exception as error:
            self.failure = f"the checkpoint cannot be written: {error}; older ones are untouched"

    def join(self, timeout: float | None = None) -> str | None:
        self._thread.join(timeout)
        return self.failure


def _place(folder: Path) -> tuple[int, int] | None:
    """What a folder is, whatever its name; None if it has gone."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
