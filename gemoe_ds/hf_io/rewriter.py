"""The way back: a Hugging Face folder written anew, with some of its parameters replaced."""

from __future__ import annotations

import shutil
from collections.abc import Container, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gemoe_ds.errors import CheckpointError
from gemoe_ds.hf_io.companions import companions, write_index
from gemoe_ds.hf_io.key_rules import Shape, StoredSlice
from gemoe_ds.hf_io.loader import Weights
from gemoe_ds.hf_io.quantised_tensor import QuantisedTensor
from gemoe_ds.hf_io.safetensors_reader import INDEX, StoredTensor

DISK_ERRORS = (OSError, SafetensorError)  # of a full disk: `save_file` raises the latter


def rewrite(
    weights: Weights, changed: Mapping[str, Tensor], out: Path, share: tuple[int, int] = (0, 1)
) -> None:
    """The files of the folder of `weights` in `out`, these parameters (whole, by name) replaced.

    Whatever is not changed is copied as it is stored; what trained in float32 stays float32.
    What the folder lacks (`may_lack`) goes into its last file. With `share` = (rank, ranks) this
    rank's part of the files is written, and only what these hold is read; once all are there,
    `index_files` completes the folder.
    """
    assert changed.keys() <= weights.shapes.keys(), changed.keys() - weights.shapes.keys()
    out.mkdir(parents=True, exist_ok=True)
    # 1. which stored tensors change, and in which files they are
    slices = by_key(weights, changed)
    new = weights.keys.stored_shapes(_lacking(weights, changed))
    for key in slices:
        if isinstance(weights.stored[key], QuantisedTensor):
            raise CheckpointError(
                f"{key} has trained and is stored in few bits in {weights.folder}; give --base the "
                "folder before it was quantised, or --quantise float8, int8 or nf4"
            )
    files = sorted({stored.file for stored in weights.raw.values()})
    touched = {weights.stored[key].file for key in slices} | ({files[-1]} if new else set())
    # 2. all files but the weights; servers look for weights in the folder itself, not below
    names = {file: "-".join(file.relative_to(weights.folder).parts) for file in files}
    rank, num_ranks = share
    for path in companions(weights.folder) if rank == 0 else ():
        shutil.copyfile(path, out / path.name)
    # 3. the weights, one file in memory at a time
    for file in files[rank::num_ranks]:
        if file not in touched:
            shutil.copyfile(file, out / names[file])
            continue
        tensors = added(weights, changed) if file == files[-1] else {}
        for key, stored in weights.raw.items():
            if stored.file == file:
                tensors[key] = replaced(stored, slices.get(key, []), changed)
        save_file(tensors, out / names[file], metadata={"format": "pt"})
    # 4. the index, if there was one
    if num_ranks == 1 and (weights.folder / INDEX).exists():
        file_of = {key: names[stored.file] for key, stored in weights.raw.items()}
        write_index(out, file_of | dict.fromkeys(new, names[files[-1]]))


def by_key(weights: Weights, names: Container[str]) -> dict[str, list[StoredSlice]]:
    """What makes up parameters of these names, by the stored tensor that it is in."""
    slices: dict[str, list[StoredSlice]] = {}
    for piece in (*weights.slices, *weights.tied_copies):
        if piece.name in names:
            slices.setdefault(piece.key, []).append(piece)
    return slices


def replaced(
    stored: StoredTensor, slices: list[StoredSlice], changed: Mapping[str, Tensor]
) -> Tensor:
    """A stored tensor with these slices of it changed, in the wider of the two dtypes."""
    tensor = stored.read()
    for piece in slices:
        ours = piece.to_stored(piece.ours(changed[piece.name]))
        tensor = tensor.to(torch.promote_types(ours.dtype, tensor.dtype))
        tensor[piece.stored_rows(stored.shape) or ...] = ours
    return tensor


def _lacking(weights: Weights, changed: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Those that the folder has none of."""
    there = {piece.name for piece in weights.slices}
    return {name: weights.shapes[name] for name in changed if name not in there}


def added(weights: Weights, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stored tensors of the parameters that the folder has none of."""
    tensors: dict[str, Tensor] = {}
    for name, shape in _lacking(weights, changed).items():
        for key, stored_shape in weights.keys.stored_shapes({name: shape}).items():
            tensors.setdefault(key, torch.empty(stored_shape, dtype=changed[name].dtype))
        for piece in weights.keys.of(name, shape):
            rows = piece.stored_rows(tuple(tensors[piece.key].shape))
            tensors[piece.key][rows or ...] = piece.to_stored(piece.ours(changed[name]))
    return tensors
