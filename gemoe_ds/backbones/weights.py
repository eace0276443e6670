"""A Hugging Face folder and the model it fills: every rank reads what it keeps, and nothing else.

`Weights` is checked as a whole (headers, keys, shapes) before the first byte of a tensor is read.
`rewrite` goes the other way: the same folder with some parameters replaced.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from gemoe_ds.backbones.keys import KeyMap, Piece, Shape
from gemoe_ds.backbones.stored import StoredTensor, open_stored
from gemoe_ds.errors import CheckpointError, ConfigError
from gemoe_ds.position import HERE


def shell(model_class: type[nn.Module], config: object) -> nn.Module:
    """A model whose parameters are shapes without memory; buffers, which no file has, are real.

    It draws no random numbers, so that what is drawn afterwards does not depend on it.
    """
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # if it is, it is being tied
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    # Not `torch.device("meta")`: rotary frequencies and position ids would be lost. Not the
    # accelerate library's way of doing this: its presence changes how transformers loads.
    nn.Module.register_parameter = without_memory  # type: ignore[method-assign, assignment]
    try:
        with torch.random.fork_rng(devices=[]):
            return model_class(config)  # type: ignore[call-arg]
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@dataclass(frozen=True)
class Target:
    """Memory for a parameter of this (whole) shape, or for its rows from `first_row` on."""

    tensor: Tensor
    shape: Shape
    first_row: int = 0

    def holds(self, piece: Piece) -> bool:
        rows = range(self.first_row, self.first_row + len(self.tensor)) if self.shape else ()
        return piece.row is None or piece.row in rows


class Weights:
    """What a folder has for the parameters of `model`, which may be a shell.

    Raises CheckpointError naming the folder and the file or key if anything is missing, damaged,
    unexpected or of another shape.
    """

    def __init__(
        self, folder: Path, keys: KeyMap, model: nn.Module, may_lack: Sequence[str] = ()
    ) -> None:
        """`may_lack`: patterns of names that a folder may have none of, whose parameters have
        memory and values then."""
        self.folder = folder
        self.shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        # a tied parameter has several names; a file may have it under any or all of them
        tied = dict(model.named_parameters(remove_duplicate=False)).keys() - self.shapes.keys()
        try:
            self.stored: dict[str, StoredTensor] = open_stored(folder)
            shapes = {key: tensor.shape for key, tensor in self.stored.items()}
            wanted = self._present(keys, may_lack)
            self.pieces = keys.pieces(shapes, wanted, optional=tied)
        except CheckpointError as error:
            raise CheckpointError(f"model.checkpoint={folder}: {error}") from error
        place = {key: number for number, key in enumerate(self.stored)}
        self.pieces.sort(key=lambda piece: (place[piece.key], piece.row or 0))

    def _present(self, keys: KeyMap, may_lack: Sequence[str]) -> dict[str, Shape]:
        """The parameters without those that may be left out and are."""
        some = {n for n in self.shapes if any(fnmatchcase(n, pattern) for pattern in may_lack)}
        if any(piece.key in self.stored for n in some for piece in keys.of(n, self.shapes[n])):
            return self.shapes
        return {name: shape for name, shape in self.shapes.items() if name not in some}

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """One whole parameter."""
        shape = self.shapes[name]
        tensor = torch.empty(shape, dtype=dtype)
        self.fill({name: Target(tensor, shape)})
        return tensor

    def fill(self, targets: Mapping[str, Target], *, show_progress: bool = False) -> None:
        """Read every target, in the order in which it stands on the disk."""
        pieces = [p for p in self.pieces if p.name in targets and targets[p.name].holds(p)]
        sizes = [targets[p.name].tensor.itemsize * self._view(p, targets).numel() for p in pieces]
        with tqdm(
            total=sum(sizes),
            desc="loading",
            unit="B",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not show_progress,
        ) as bar:
            for piece, size in zip(pieces, sizes, strict=True):
                self._read_piece(piece, self._view(piece, targets))
                bar.update(size)
                HERE.moves += 1

    @staticmethod
    def _view(piece: Piece, targets: Mapping[str, Target]) -> Tensor:
        target = targets[piece.name]
        return piece.ours(target.tensor.detach(), target.first_row)

    def _read_piece(self, piece: Piece, view: Tensor) -> None:
        stored = self.stored[piece.key]
        rows = piece.stored_rows(stored.shape)
        if piece.rule.rearrange is None and not piece.rule.by_row:
            stored.read_into(view, rows.start if rows else 0)
        else:
            view.copy_(piece.to_ours(stored.read(rows)))

    def rewrite(self, changed: Mapping[str, Tensor], out: Path) -> None:
        """The folder's files in `out`, these parameters (whole, by name) replaced.

        Whatever is not changed is copied as it is stored; what trained in float32 stays float32.
        """
        of_key: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            if piece.name in changed:
                of_key.setdefault(piece.key, []).append(piece)
        touched = {self.stored[key].file for key in of_key}
        for path in sorted(self.folder.iterdir()):
            if path.suffix == ".json":
                shutil.copy(path, out)
        for file in sorted({tensor.file for tensor in self.stored.values()}):
            if file not in touched:
                shutil.copy(file, out)
                continue
            tensors = {}
            for key, stored in self.stored.items():
                if stored.file == file:
                    tensors[key] = tensor = stored.read()
                    for piece in of_key.get(key, ()):
                        rows = piece.stored_rows(stored.shape)
                        ours = piece.to_stored(piece.ours(changed[piece.name]))
                        wider = torch.promote_types(ours.dtype, tensor.dtype)
                        tensors[key] = tensor = tensor.to(wider)
                        tensor[rows or ...] = ours
            save_file(tensors, out / file.name, metadata={"format": "pt"})


def materialise(model: nn.Module, dtype: torch.dtype) -> dict[str, Target]:
    """Give every parameter without memory some: float32 if it trains, `dtype` if it does not.

    Returns them by name; a tied parameter once. Parameters that have memory stay as they are.
    """
    made: dict[int, nn.Parameter] = {}
    targets = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if not parameter.is_meta:
            continue
        if id(parameter) not in made:
            kept = torch.float32 if parameter.requires_grad else dtype
            tensor = torch.empty(parameter.shape, dtype=kept)
            made[id(parameter)] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            targets[name] = Target(made[id(parameter)], tuple(parameter.shape))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made[id(parameter)])
    return targets


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of model.checkpoint; CheckpointError without one."""
    try:
        found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"model.checkpoint={folder}: no config.json there; give a Hugging Face folder"
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"model.checkpoint={folder}: config.json is damaged ({error})"
        ) from error
    return found


def config_of(config_class: Any, folder: Path | None, backbone: str) -> Any:
    """The configuration in a folder, which must be of this class's model type.

    `config_class` is transformers', or has `from_json`.
    """
    if folder is None:
        raise ConfigError(f"model.checkpoint: backbone {backbone!r} starts from one; give a folder")
    found = read_config(folder)
    kind = found.get("model_type")
    if kind != config_class.model_type:
        raise CheckpointError(
            f"model.checkpoint={folder} is of model_type {kind!r}, backbone {backbone!r} has "
            f"{config_class.model_type!r}"
        )
    try:
        if hasattr(config_class, "from_json"):
            return config_class.from_json(found)
        return config_class.from_pretrained(folder)
    except Exception as error:  # whatever the reader chokes on, the file is what is wrong
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise CheckpointError(f"model.checkpoint={folder}: config.json: {reason}") from error
