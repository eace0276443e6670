"""Which weights an evaluation is of, and how they were trained: what tells two of them apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemoe_ds.checkpoint.manifest import WEIGHTS, Checkpoint, newest, read
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
    """`trained` and `training` are empty for the untouched model."""

    base: str | None  # a digest; None: random weights
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


def origin_of(base: str | None, trained: Path | None, world: World) -> Origin:
    """Of a base folder, and of a run or checkpoint. Collective: the first rank reads."""

    def found() -> Origin:
        if trained is None:
            return Origin(base_digest(base))
        checkpoint = read(newest(trained))
        return Origin(base_digest(base), trained_digest(checkpoint), training_of(checkpoint))

    return broadcast_from_first(found, world)


def base_digest(folder: str | None) -> str | None:
    """Over the name, shape, dtype and first 4 KiB of every tensor, and config.json."""
    if folder is None:
        return None
    total = hashlib.sha256()
    config = Path(folder) / "config.json"
    if config.is_file():
        total.update(config.read_bytes())
    for key, tensor in sorted(open_stored(Path(folder)).items()):
        total.update(f"{key} {tensor.shape} {tensor.dtype}\0".encode())
        with open(tensor.file, "rb", buffering=0) as file:
            file.seek(tensor.offset)
            total.update(file.read(min(_SAMPLE, tensor.num_bytes)))
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
