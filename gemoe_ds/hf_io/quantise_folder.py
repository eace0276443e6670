"""A Hugging Face folder written anew in 8 or 4 bits, in the formats of quantised_tensor.py.

Stored tensors keep their keys, but for experts that are stored with inputs before outputs: those
become matrices of one expert each, as most families publish them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gemoe_ds.console import Progress
from gemoe_ds.errors import CheckpointError
from gemoe_ds.hf_io.companions import companions, write_index
from gemoe_ds.hf_io.key_rules import KeyMap, Shape, StoredSlice
from gemoe_ds.hf_io.loader import Weights
from gemoe_ds.hf_io.quantised_tensor import BLOCK, METHOD, OF_BLOCKS, OF_ROWS, QuantisedTensor
from gemoe_ds.hf_io.rewriter import added, by_key, replaced
from gemoe_ds.hf_io.safetensors_reader import StoredTensor
from gemoe_ds.hf_io.targets import problem_of
from gemoe_ds.moe.experts.quantised import FORMATS, Format, encode

_SHARD = 4 * 10**9  # bytes of a file, which is in memory while it is made


def quantise_folder(
    weights: Weights,
    changed: Mapping[str, Tensor],
    out: Path,
    format_of: Mapping[str, str],
    keys: KeyMap,
) -> None:
    """The folder of `weights` in `out`, with the parameters of `format_of` (name -> one of FORMATS)
    in few bits, and those of `changed` (whole, by name) replaced before.

    All else stays as it is stored, but that a float8 folder has no other few bits. `keys`: all ways
    in which the backbone's experts are stored. Of the base one matrix is in memory, and of what is
    written a file of some gigabytes. CheckpointError for NaN and the like.
    """
    out.mkdir(parents=True, exist_ok=True)
    for path in companions(weights.folder):
        shutil.copyfile(path, out / path.name)
    slices, formats = by_key(weights, weights.shapes), {*format_of.values()}
    shards, whole = _Shards(out), list[str]()
    total = sum(stored.num_bytes for stored in weights.stored.values())
    with Progress(total=total, desc="quantising", unit="B", unit_scale=True) as bar:
        for key, stored in weights.stored.items():
            source = _Source(weights, key, slices.get(key, []), changed)
            name = source.format(format_of)
            if name is None:
                if _add_as_it_is(shards, source, only_float8=formats == {"float8"}):
                    whole.append(key)
            elif source.is_exchanged:
                for new_key, matrix in source.matrices(keys.one_expert_each):
                    if not shards.add_quantised(new_key, name, iter([matrix]), matrix.shape):
                        whole.append(new_key)
            elif not shards.add_quantised(key, name, source.rows(), stored.shape):
                whole.append(key)
            bar.update(stored.num_bytes)
    for key, tensor in added(weights, changed).items():
        shards.add(key, tensor)
        whole.append(key)
    shards.close()
    say_quantised(out / "config.json", formats, whole)


def _add_as_it_is(shards: _Shards, source: _Source, *, only_float8: bool) -> bool:
    """Whether what is written is whole numbers, not codes."""
    stored = source.stored
    if not isinstance(stored, QuantisedTensor) or source.of_changed:
        shards.add(source.key, replaced(stored, source.of_changed, source.changed))
    elif only_float8 and not stored.format.square:
        shards.add(source.key, stored.read().to(torch.bfloat16))
    else:
        codes, scales = stored.codes.read(), stored.scales.read()
        shards.add_codes(source.key, stored.format, codes, scales)
        return False
    return True


@dataclass(frozen=True)
class _Source:
    """A stored tensor, what it is of, and what has changed of that."""

    weights: Weights
    key: str
    pieces: list[StoredSlice]
    changed: Mapping[str, Tensor]

    @property
    def stored(self) -> StoredTensor:
        return self.weights.stored[self.key]

    @property
    def of_changed(self) -> list[StoredSlice]:
        return [piece for piece in self.pieces if piece.name in self.changed]

    @property
    def is_exchanged(self) -> bool:
        """Whether these are stacked experts with inputs before outputs."""
        return any(piece.rule.by_row and piece.rule.rearrange for piece in self.pieces)

    def format(self, format_of: Mapping[str, str]) -> str | None:
        """If all of it goes into the same one."""
        names = {format_of.get(piece.name) for piece in self.pieces}
        moved = any(piece.rule.rearrange and not piece.rule.by_row for piece in self.pieces)
        fits = len(names) == 1 and not moved and len(self.stored.shape) in (2, 3)
        return names.pop() if fits else None

    def rows(self) -> Iterator[Tensor]:
        """Its matrices, [M, K]: itself, or one after the other of a stack."""
        if len(self.stored.shape) == 2:
            yield self._checked(replaced(self.stored, self.of_changed, self.changed))
            return
        for row in range(self.stored.shape[0]):
            yield self._ours(row) if self.of_changed else self._read(row)[0]

    def matrices(self, one_each: KeyMap) -> Iterator[tuple[str, Tensor]]:
        """Keys and matrices, outputs by inputs, of stacked experts that are stored exchanged."""
        name, of_row = self.pieces[0].name, dict[int | None, list[StoredSlice]]()
        for part in one_each.of(name, self.weights.shapes[name]):
            of_row.setdefault(part.row, []).append(part)
        for piece in self.pieces:
            assert piece.row is not None
            ours = self._ours(piece.row)
            for part in of_row[piece.row]:
                yield part.key, part.ours(ours[None], piece.row)

    def _ours(self, row: int) -> Tensor:
        """[M, K] of an expert of a stack."""
        (piece,) = (piece for piece in self.pieces if piece.row == row)
        if piece.name in self.changed:
            return self._checked(self.changed[piece.name][row])
        return piece.to_ours(self._read(row))

    def _read(self, row: int) -> Tensor:
        return self._checked(self.stored.read(slice(row, row + 1)))

    def _checked(self, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and (problem := problem_of(tensor)):
            raise CheckpointError(
                f"model.checkpoint={self.weights.folder}: {self.key} {problem}; download it again, "
                "or convert it again"
            )
        return tensor


@dataclass
class _Shards:
    """Files of a bounded size, numbered, with their index."""

    folder: Path
    tensors: dict[str, Tensor] = field(default_factory=dict)
    number_of: dict[str, int] = field(default_factory=dict)  # of the file that a key is in
    size: int = 0
    number: int = 0

    def add(self, key: str, tensor: Tensor) -> None:
        if self.size and self.size + tensor.nbytes > _SHARD:
            self._write()
        self.tensors[key], self.number_of[key] = tensor.contiguous(), self.number
        self.size += tensor.nbytes

    def add_quantised(self, key: str, name: str, matrices: Iterable[Tensor], shape: Shape) -> bool:
        """[M, K], or [E, M, K] one by one; as they are, and False, if inputs share bytes of codes
        with those of the next row."""
        one, (*rows, num_inputs) = FORMATS[name], shape
        if num_inputs * one.bits % 8:
            self.add(key, torch.cat(list(matrices)).view(shape))
            return False
        blocks = one.blocks(num_inputs)
        codes = torch.empty(*rows, one.num_codes(blocks), dtype=one.codes)
        scales = torch.empty(*rows, blocks)
        of_each = (codes, scales) if len(shape) == 3 else (codes[None], scales[None])
        for matrix, *into in zip(matrices, *of_each, strict=True):
            encode(one, matrix, *into)
        codes = codes[..., : num_inputs * one.bits // 8].contiguous()
        if one.square:
            codes, scales = codes.view(torch.float8_e4m3fn), scales[..., ::BLOCK, :]
        self.add_codes(key, one, codes, scales)
        return True

    def add_codes(self, key: str, one: Format, codes: Tensor, scales: Tensor) -> None:
        """As quantised_tensor.py has them."""
        self.add(key, codes if one.square else codes.flatten())
        self.add(key + (OF_BLOCKS if one.square else OF_ROWS), scales)

    def close(self) -> None:
        self._write()
        names = [f"model-{n + 1:05d}-of-{self.number:05d}.safetensors" for n in range(self.number)]
        for number, name in enumerate(names):
            (self.folder / f"{number}.part").rename(self.folder / name)
        write_index(self.folder, {key: names[number] for key, number in self.number_of.items()})

    def _write(self) -> None:
        save_file(self.tensors, self.folder / f"{self.number}.part", metadata={"format": "pt"})
        self.tensors, self.size, self.number = {}, 0, self.number + 1


def say_quantised(path: Path, formats: set[str], whole: Iterable[str]) -> None:
    """In config.json, as transformers and vLLM read it of float8; `whole`: keys that are not."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for section in (config, *config.values()):
        if isinstance(section, dict):
            section.pop("quantization_config", None)
    if formats == {"float8"}:
        modules = sorted(key.removesuffix(".weight") for key in whole if key.endswith(".weight"))
        said: dict[str, Any] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": modules,
        }
    else:
        said = {"quant_method": METHOD, "formats": sorted(formats)}
    config["quantization_config"] = said
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
