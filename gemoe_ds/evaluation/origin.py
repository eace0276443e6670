"""Which weights an evaluation is of, and how they were trained: what tells two of them apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemoe_ds.checkpoint.manifest import WEIGHTS, Checkpoint, read
from gemoe_ds.engine.world import World, broadcast_from_first
from gemoe_ds.hf_io.safetensors_reader import open_stored
from gemoe_ds.train.recipe_changes import recipe_of

_SAMPLE = 4096  # bytes of every tensor of a base: of 60 GB no more is read
# What one training may do otherwise than another beside its seed, and is then another method.
_OPTIONS = (
    "model.router.",
    "model.trainable",
    "model.gate_gradient",
    "optim.",
    "train.steps",
    "train.epochs",
    "train.distill",
    "train.early_stop",
    "train.auxiliary_batch_size",
)
_IDENTITY = ("data", "samples per step")  # of a checkpoint


@dataclass(frozen=True)
class Origin:
    """All but `base` is empty for the untouched model."""

    base: str | None  # a digest; None: random weights
    checkpoint: Path | None = None
    trained: str | None = None  # of what was trained, too
    training: Mapping[str, Any] = field(default_factory=dict)  # its options, the seed aside

    @property
    def untouched(self) -> Origin:
        return Origin(self.base)

    def told(self) -> dict[str, Any]:
        """As eval.json and mode.json have it."""
        return {
            "base_digest": self.base,
            "trained_digest": self.trained,
            "training": dict(self.training),
        }


def origin_of(base: str | None, checkpoint: Path | None, world: World) -> Origin:
    """Of a base folder, and of a checkpoint that is whole. Collective: the first rank reads."""

    def found() -> Origin:
        if checkpoint is None:
            return Origin(base_digest(base))
        one = read(checkpoint)
        return Origin(base_digest(base), checkpoint, trained_digest(one), training_of(one))

    return broadcast_from_first(found, world)


def base_digest(folder: str | None) -> str | None:
    """Over the name, shape, dtype and first 4 KiB of every tensor, and config.json."""
    if folder is None:
        return None
    total = hashlib.sha256()
    config = Path(folder) / "config.json"
    if config.is_file():
        total.update(config.read_bytes())
    stored = open_stored(Path(folder))
    with ExitStack() as stack:
        paths = {tensor.file for tensor in stored.values()}
        files = {path: stack.enter_context(open(path, "rb", buffering=0)) for path in paths}
        for key, tensor in sorted(stored.items()):
            total.update(f"{key} {tensor.shape} {tensor.dtype}\0".encode())
            files[tensor.file].seek(tensor.offset)
            total.update(files[tensor.file].read(min(_SAMPLE, tensor.num_bytes)))
    return total.hexdigest()[:16]


def trained_digest(checkpoint: Checkpoint) -> str:
    """Over the names and checksums of its weights."""
    entries = checkpoint.manifest["tensors"]
    total = hashlib.sha256()
    for key in sorted(checkpoint.keys(WEIGHTS)):
        total.update(f"{key} {entries[key]['sha256']}\0".encode())
    return total.hexdigest()[:16]


def training_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The options that make a training what it is, by their dotted names; {} if it does not say."""
    recipe = recipe_of(checkpoint)
    options = {key: value for key, value in recipe.items() if key.startswith(_OPTIONS)}
    identity = checkpoint.manifest["identity"]
    return options | {key: identity[key] for key in _IDENTITY if options and key in identity}
