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
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gemoe_ds.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # bytes, as in the library
_STAGE_BYTES = 2**26  # converted at a time

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
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

    def _read_bytes(self, target: Tensor, offset: int) -> None:
        left = memoryview(target.detach().view(-1).view(torch.uint8).numpy())
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
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} there")
        return _open_file(folder / SINGLE)
    try:
        file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(file_of.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({error!r}); download it again") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing[:5])}"
        )
    stored: dict[str, StoredTensor] = {}
    for name in names:
        found = _open_file(folder / name)
        listed = {key for key, file in file_of.items() if file == name}
        if odd := sorted(listed ^ found.keys()):
            raise CheckpointError(
                f"{folder / name} and {INDEX} disagree about {odd[0]} "
                f"({len(odd)} tensors); download both again"
            )
        stored |= found
    return stored


def _open_file(path: Path) -> dict[str, StoredTensor]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > min(_MAX_HEADER, size - 8):
                raise ValueError(f"a header of {header_bytes} bytes in a file of {size}")
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        start = 8 + header_bytes
        found, end = {}, 0
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            tensor = StoredTensor(
                path, start + first, tuple(entry["shape"]), _DTYPES[entry["dtype"]]
            )
            if first != end or last - first != tensor.num_bytes:
                raise ValueError(f"{key} has {last - first} bytes at {first}")
            found[key], end = tensor, last
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); download it again") from error
    if start + end != size:
        raise CheckpointError(
            f"{path} has {size} bytes, its header says {start + end}: cut short or damaged; "
            "download it again"
        )
    return found
