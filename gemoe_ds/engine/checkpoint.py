"""Checkpoints: written whole or not at all, verified before use, refused when foreign.

    checkpoints/step-000200/
      trained.safetensors   every parameter that trains, float32, by name: all that inference needs
      deepspeed/            optimizer shards, schedule: DeepSpeed's own format
      manifest.json         schema, step, identity of the run, sha256 of every file
    checkpoints/latest      the name of the newest one, moved last

Frozen weights are never stored; the identity records the checksum of the base checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gemoe_ds.backbones.model import MoEModel
from gemoe_ds.config import RunConfig
from gemoe_ds.data.sample import fsync_path, sha256_of
from gemoe_ds.engine.build import Engine
from gemoe_ds.engine.distributed import World
from gemoe_ds.errors import CheckpointError

SCHEMA = 1
TRAINED = "trained.safetensors"
MANIFEST = "manifest.json"
LATEST = "latest"
DEEPSPEED = "deepspeed"


@dataclass(frozen=True)
class Found:
    """A checkpoint that has passed verification."""

    folder: Path
    step: int
    manifest: dict[str, Any]


def run_identity(
    config: RunConfig, world_size: int, data_fingerprint: str, base_checksum: str
) -> dict[str, Any]:
    """What must be equal for a checkpoint to continue this run, flat: name -> value."""
    model = config.model.model_dump(mode="json")
    identity = {f"model.{key}": model[key] for key in ("backbone", "router", "train", "dtype")}
    identity["base checkpoint"] = base_checksum
    identity["data"] = data_fingerprint
    identity["seed"] = config.seed
    identity["train.micro_batch"] = config.train.micro_batch
    identity["train.accumulation"] = config.train.accumulation
    identity["parallel.ep_size"] = config.parallel.ep_size
    identity["ranks"] = world_size
    identity["zero stage"] = config.zero_stage
    return identity


def checksum_folder(folder: Path | None) -> str:
    """sha256 over the files of a model folder (names and contents); "none" without one."""
    if folder is None:
        return "none"
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors")):
        digest.update(path.name.encode())
        digest.update(sha256_of(path).encode())
    return digest.hexdigest()


def save(
    engine: Engine,
    model: MoEModel,
    output: Path,
    step: int,
    identity: dict[str, Any],
    world: World,
    keep: int,
) -> Path:
    """Write `step-NNNNNN` beside its siblings and move `latest` to it. Every rank must call it.

    A temporary folder is filled, synced and renamed, so a crash at any point leaves the older
    checkpoints untouched and `latest` on a whole one.
    """
    root = output / "checkpoints"
    final, temporary = root / f"step-{step:06d}", root / f".writing-step-{step:06d}"
    if world.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(
        str(temporary), tag=DEEPSPEED, save_latest=False, exclude_frozen_parameters=True
    )
    if world.is_first:
        tensors = {n: p.detach().cpu().contiguous() for n, p in model.trainable().items()}
        save_file(tensors, temporary / TRAINED)
    dist.barrier()
    if world.is_first:
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        manifest = {
            "schema": SCHEMA,
            "step": step,
            "identity": identity,
            "files": {str(p.relative_to(temporary)): sha256_of(p) for p in files},
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in [*files, temporary / MANIFEST, temporary / DEEPSPEED, temporary]:
            fsync_path(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        pointer = root / f".{LATEST}"
        pointer.write_text(final.name)
        fsync_path(pointer)
        os.replace(pointer, root / LATEST)
        fsync_path(root)
        for old in sorted(root.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def find(resume: str, output: Path, identity: dict[str, Any]) -> tuple[Found | None, list[str]]:
    """The checkpoint that `resume` means ("none", "auto" or a folder), and why others were skipped.

    "auto" takes the newest one that is whole, and None where there is none at all. A named one
    that is damaged, or one of another run, is a CheckpointError.
    """
    if resume == "none":
        return None, []
    if resume != "auto":
        return verify(Path(resume), identity), []
    candidates = sorted((output / "checkpoints").glob("step-*"), reverse=True)
    skipped = []
    for folder in candidates:
        try:
            found = verify(folder, None)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        return verify(found.folder, identity), skipped
    if candidates:
        raise CheckpointError(
            f"{output}: none of {len(candidates)} checkpoints is whole; the newest: {skipped[0]}"
        )
    return None, []


def newest(run: Path) -> Path:
    """The newest whole checkpoint of a run folder; CheckpointError if there is none."""
    found, _ = find("auto", run, {})
    if found is None:
        raise CheckpointError(f"{run}: no checkpoint there; give the output_dir of a training run")
    return found.folder


def verify(folder: Path, identity: dict[str, Any] | None) -> Found:
    """Check schema, checksums and, unless None, the identity; CheckpointError if not."""
    manifest_path = folder / MANIFEST
    if not manifest_path.is_file():
        raise CheckpointError(
            f"{folder}: no {MANIFEST} there; give a folder such as OUTPUT/checkpoints/step-000200"
        )
    try:
        manifest = json.loads(manifest_path.read_text())
        schema, step, files = manifest["schema"], int(manifest["step"]), dict(manifest["files"])
        stored = dict(manifest["identity"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: {MANIFEST} is damaged ({error!r}); use another"
        ) from error
    if schema != SCHEMA:
        raise CheckpointError(f"{folder}: schema {schema}, this version reads {SCHEMA}")
    if identity is not None:
        for key, value in identity.items():
            if stored.get(key) != value:
                raise CheckpointError(
                    f"{folder} belongs to another run: its {key} is {stored.get(key)!r}, "
                    f"this run's is {value!r}; set resume=none and another output_dir to start anew"
                )
    for name, checksum in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing; use another checkpoint")
        if sha256_of(path) != checksum:
            raise CheckpointError(f"{folder}: {name} is damaged (checksum); use another checkpoint")
    return Found(folder, step, manifest)


def restore(engine: Engine, model: MoEModel, found: Found) -> None:
    """Load weights, optimizer and schedule; check the weights by value. Collective."""
    engine.load_checkpoint(str(found.folder), tag=DEEPSPEED, load_module_strict=False)
    stored = load_trained(found.folder)
    _check_names(model, stored, found.folder)
    for name, parameter in model.trainable().items():
        if not torch.equal(parameter.detach().cpu(), stored[name]):
            raise CheckpointError(f"{found.folder}: DeepSpeed restored other values for {name}")


def load_trained(folder: Path) -> dict[str, torch.Tensor]:
    """The trained parameters of a checkpoint, float32 on the CPU, by name."""
    try:
        return load_file(folder / TRAINED)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: {TRAINED} cannot be read: {error}") from error


@torch.no_grad()
def put_trained(model: MoEModel, folder: Path) -> None:
    """Load only the trained parameters into a converted model, for evaluation."""
    stored = load_trained(folder)
    _check_names(model, stored, folder)
    for name, parameter in model.trainable().items():
        parameter.copy_(stored[name])


def _check_names(model: MoEModel, stored: dict[str, torch.Tensor], folder: Path) -> None:
    shapes = {name: tuple(p.shape) for name, p in model.trainable().items()}
    found = {name: tuple(t.shape) for name, t in stored.items()}
    if shapes != found:
        differ = sorted({n for n in shapes | found if shapes.get(n) != found.get(n)})
        raise CheckpointError(
            f"{folder} does not fit this model: {len(differ)} tensors differ, first {differ[0]}: "
            f"stored {found.get(differ[0])}, expected {shapes.get(differ[0])}"
        )
