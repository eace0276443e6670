"""Tensors in a Hugging Face folder, read piece by piece straight into the memory that keeps them.

The safetensors library maps files into memory, and mapped pages count as this process's own: a
rank that keeps half of the experts would peak at far more than it keeps. The format is a header of
JSON and then plain bytes (github.com/huggingface/safetensors, "Format"), so rows are read with
`preadv` to where they stay. Damage that shows in headers, sizes and the index is found first.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from gemoe_ds.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # bytes, as in the library
_STAGE_BYTES = 2**26  # converted at a time
_LONGEST_NAME = 255  # of a file, in most file systems

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: where its bytes are."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, rows: slice | None = None) -> Tensor:
        """These rows of its first dimension (all of them by default), in its own dtype."""
        shape = self.shape
        if rows is not None:
            shape = (rows.stop - rows.start, *shape[1:])
        tensor = torch.empty(shape, dtype=self.dtype)
        self.read_into(tensor, rows.start if rows else 0)
        return tensor

    def prefetch(self, rows: slice | None = None) -> None:
        """These rows will be read soon: the system may fetch them from the disk meanwhile."""
        if not hasattr(os, "posix_fadvise"):  # not Linux
            return
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        first, size = 0, self.num_bytes
        if rows is not None:
            first, size = rows.start * row_bytes, (rows.stop - rows.start) * row_bytes
        with open(self.file, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), self.offset + first, size, os.POSIX_FADV_WILLNEED)

    def read_into(self, target: Tensor, first_row: int = 0) -> None:
        """Fill `target` with as many rows as it has, converting if its dtype is another one."""
        if not target.numel():
            return
        row_items = math.prod(self.shape[1:])
        offset = self.offset + first_row * row_items * self.dtype.itemsize
        if target.dtype == self.dtype and target.is_contiguous() and target.device.type == "cpu":
            self._read_bytes(target, offset)
            return
        parts = target.split(max(1, _STAGE_BYTES // (row_items * 8))) if target.dim() else (target,)
        for part in parts:
            stage = torch.empty(part.shape, dtype=self.dtype)
            self._read_bytes(stage, offset)
            part.copy_(stage)
            offset += stage.numel() * stage.itemsize

    def equals(self, other: StoredTensor) -> bool:
        """Whether both (not scalars) hold the same numbers; read part by part."""
        if self.shape != other.shape:
            return False
        dtype, rows = torch.promote_types(self.dtype, other.dtype), self.shape[0]
        step = max(1, _STAGE_BYTES // max(1, math.prod(self.shape[1:]) * dtype.itemsize))
        parts = (slice(first, min(first + step, rows)) for first in range(0, rows, step))
        return all(torch.equal(self.read(p).to(dtype), other.read(p).to(dtype)) for p in parts)

    def _read_bytes(self, target: Tensor, offset: int) -> None:
        left = target.detach().view(-1).view(torch.uint8).numpy().data
        with open(self.file, "rb", buffering=0) as file:
            while left:
                got = os.preadv(file.fileno(), [left], offset)
                if got == 0:
                    raise CheckpointError(f"{self.file} ended while it was read; was it replaced?")
                left, offset = left[got:], offset + got


def open_stored(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder by its key, in order of files and offsets.

    Raises CheckpointError that names the file: missing, cut short, damaged, or at odds with the
    index.
    """
    index = folder / INDEX
    refuse_dead_links(folder)
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise CheckpointError(f"{folder}: {_instead(folder)}")
        return open_file(folder / SINGLE)
    file_of = _read_index(index)
    names = sorted(set(file_of.values()))
    if SINGLE not in names and (folder / SINGLE).is_file():
        raise CheckpointError(
            f"{folder} has {SINGLE} beside {INDEX}, which does not list it: two models, of which "
            "transformers reads the former; remove the one that is not meant"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing[:5])}"
        )
    stored: dict[str, StoredTensor] = {}
    for name in names:
        found = open_file(folder / name)
        listed = {key for key, file in file_of.items() if file == name}
        if odd := sorted(listed ^ found.keys()):
            raise CheckpointError(
                f"{folder / name} and {INDEX} disagree about {odd[0]} "
                f"({len(odd)} tensors); download both again"
            )
        stored |= found
    return stored


def refuse_dead_links(folder: Path) -> None:
    """A snapshot of the Hub's cache is links to blobs, which a copy may have left behind."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_symlink() and not path.exists():
            raise CheckpointError(
                f"{folder}: {path.name} is a link to {path.readlink()}, which is not there; copy "
                "the folder with what its links lead to (cp -rL)"
            )


def _instead(folder: Path) -> str:
    """What is in a folder that has no weights under the names of this format, and the way out."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    tensors = [name for name in names if name.endswith(".safetensors")]
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if "adapter_config.json" in names:
        return (
            "an adapter of PEFT, not a model; load it on its base, and save what "
            "merge_and_unload() returns"
        )
    if any("-of-" in name for name in tensors):
        return f"{tensors[0]} and others are shards without their {INDEX}; download it too"
    if tensors:
        return f"{tensors[0]} has another name than {SINGLE}; rename it"
    if pickled:
        return (
            f"{pickled[0]} is a pickle, which can run code; convert it where you trust it: "
            "from_pretrained(THIS).save_pretrained(NEW) of transformers writes safetensors"
        )
    return f"neither {SINGLE} nor {INDEX} there"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; OSError, or ValueError that says what is wrong with it."""
    return _object(path.read_bytes(), "it")


def _object(text: bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{what} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} is no object of names and values")
    return found


def _read_index(path: Path) -> dict[str, str]:
    """Key -> file name."""
    try:
        file_of = read_json(path).get("weight_map")
        if not isinstance(file_of, dict) or not file_of:
            raise ValueError("it has no weight_map of keys and file names")
        for key, name in file_of.items():
            if not isinstance(name, str) or not _is_inside(name):
                raise ValueError(
                    f"it has {str(name)[:40]!r} as the file of {key}, which is none in this folder"
                )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); download it again") from error
    return file_of


def _is_inside(name: str) -> bool:
    """Whether this is the name of a file in the folder or in one below."""
    parts = name.split("/")
    return all(part not in ("", ".", "..") and len(part) <= _LONGEST_NAME for part in parts)


def open_file(path: Path) -> dict[str, StoredTensor]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            first = file.read(8)
            header_bytes = int.from_bytes(first, "little")
            if first == b"version ":
                raise _Unsupported("a pointer of Git LFS, without the file; run `git lfs pull`")
            if len(first) < 8 or header_bytes > min(_MAX_HEADER, size - 8):
                raise ValueError(f"a header of {header_bytes} bytes in a file of {size}")
            header = _object(file.read(header_bytes), "its header")
        header.pop("__metadata__", None)
        start, end = 8 + header_bytes, 0
        entries = [(key, *_entry(key, entry)) for key, entry in header.items()]
        found = {}
        for key, dtype, shape, begins, ends in sorted(entries, key=lambda entry: entry[3:]):
            tensor = StoredTensor(path, start + begins, shape, dtype)
            if begins != end or ends - begins != tensor.num_bytes:
                raise ValueError(
                    f"{key} has {ends - begins} bytes at {begins}; of its shape, and after the "
                    f"one before, it would have {tensor.num_bytes} at {end}"
                )
            found[key], end = tensor, ends
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except _Unsupported as error:
        raise CheckpointError(f"{path}: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); download it again") from error
    if start + end != size:
        raise CheckpointError(
            f"{path} has {size} bytes, its header says {start + end}: cut short or damaged; "
            "download it again"
        )
    return found


class _Unsupported(ValueError):
    """A tensor that is not damaged, and yet cannot be read."""


def _entry(key: str, entry: object) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """Dtype, shape and where the bytes are; ValueError for what is no tensor."""
    wanted = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, dict) or not all(name in entry for name in wanted):
        raise ValueError(f"{key} lacks one of {', '.join(wanted)}")
    kind, shape, offsets = (entry[name] for name in wanted)
    if not _are_sizes(shape):
        raise ValueError(f"{key} has the shape {str(shape)[:60]}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{key} has the offsets {str(offsets)[:60]}")
    if not isinstance(kind, str):
        raise ValueError(f"{key} has the dtype {str(kind)[:60]}")
    if kind not in _DTYPES:
        raise _Unsupported(
            f"{key} is stored as {kind[:20]}, which is not supported ({', '.join(_DTYPES)} are); "
            "give the folder before it was quantised, or convert it back"
        )
    return _DTYPES[kind], tuple(shape), offsets[0], offsets[1]


def _are_sizes(found: object) -> TypeGuard[list[int]]:
    """Whether this is a list of whole numbers from 0 on; True and 2.0 are none."""
    return isinstance(found, list) and all(type(n) is int and n >= 0 for n in found)
