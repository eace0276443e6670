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
from gemoe_ds.hf_io.companions import companions, write_index
from gemoe_ds.hf_io.key_rules import KeyMap, StoredSlice
from gemoe_ds.hf_io.loader import Weights
from gemoe_ds.hf_io.quantised_tensor import BLOCK, METHOD, OF_BLOCKS, OF_ROWS, QuantisedTensor
from gemoe_ds.hf_io.rewriter import added, by_key, replaced
from gemoe_ds.moe.experts.quantised import FORMATS, encode

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

    All else stays as it is stored. `keys`: all ways in which the backbone's experts are stored.
    Tensors are read one at a time; a file of some gigabytes is in memory.
    """
    out.mkdir(parents=True, exist_ok=True)
    for path in companions(weights.folder):
        shutil.copyfile(path, out / path.name)
    slices = by_key(weights, weights.shapes)
    shards, whole = _Shards(out), list[str]()
    total = sum(stored.num_bytes for stored in weights.stored.values())
    with Progress(total=total, desc="quantising", unit="B", unit_scale=True) as bar:
        for key, stored in weights.stored.items():
            pieces = slices.get(key, [])
            name = _format(pieces, format_of, stored.shape)
            if name is None:
                whole.append(key)
                of_changed = [piece for piece in pieces if piece.name in changed]
                if isinstance(stored, QuantisedTensor) and not of_changed:
                    suffix = OF_BLOCKS if stored.format.square else OF_ROWS
                    shards.add(key, stored.codes.read())
                    shards.add(key + suffix, stored.scales.read())
                else:
                    shards.add(key, replaced(stored, of_changed, changed))
            elif pieces[0].rule.rearrange is None:
                of_changed = [piece for piece in pieces if piece.name in changed]
                shards.add_quantised(key, name, replaced(stored, of_changed, changed))
            else:
                for new_key, matrix in _matrices(weights, pieces, changed, keys):
                    shards.add_quantised(new_key, name, matrix)
            bar.update(stored.num_bytes)
    for key, tensor in added(weights, changed).items():
        shards.add(key, tensor)
    shards.close()
    say_quantised(out / "config.json", set(format_of.values()), whole)


def _format(
    pieces: list[StoredSlice], format_of: Mapping[str, str], shape: tuple[int, ...]
) -> str | None:
    """Of a stored tensor, if all of it goes into the same one."""
    names = {format_of.get(piece.name) for piece in pieces}
    name = names.pop() if len(names) == 1 else None
    rearranged = any(piece.rule.rearrange and not piece.rule.by_row for piece in pieces)
    if name is None or rearranged or len(shape) not in (2, 3):
        return None
    return None if FORMATS[name].bits == 4 and shape[-1] % 2 else name


def _matrices(
    weights: Weights, pieces: list[StoredSlice], changed: Mapping[str, Tensor], keys: KeyMap
) -> Iterator[tuple[str, Tensor]]:
    """Keys and matrices, outputs by inputs, of stacked experts that are stored the other way."""
    name, stored = pieces[0].name, weights.stored[pieces[0].key]
    of_row: dict[int | None, list[StoredSlice]] = {}
    for piece in keys.one_expert_each.of(name, weights.shapes[name]):
        of_row.setdefault(piece.row, []).append(piece)
    for piece in pieces:
        assert piece.row is not None
        if name in changed:
            ours = changed[name][piece.row]
        else:
            ours = piece.to_ours(stored.read(piece.stored_rows(stored.shape)))
        for part in of_row[piece.row]:
            yield part.key, part.ours(ours[None], piece.row)


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

    def add_quantised(self, key: str, name: str, weight: Tensor) -> None:
        """[M, K] or [E, M, K]"""
        codes, scales = _quantised(name, weight)
        self.add(key, codes)
        self.add(key + (OF_BLOCKS if FORMATS[name].square else OF_ROWS), scales)

    def close(self) -> None:
        self._write()
        names = [f"model-{n + 1:05d}-of-{self.number:05d}.safetensors" for n in range(self.number)]
        for number, name in enumerate(names):
            (self.folder / f"{number}.part").rename(self.folder / name)
        write_index(self.folder, {key: names[number] for key, number in self.number_of.items()})

    def _write(self) -> None:
        save_file(self.tensors, self.folder / f"{self.number}.part", metadata={"format": "pt"})
        self.tensors, self.size, self.number = {}, 0, self.number + 1


def _quantised(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, which end with the inputs, and scales, as they are stored."""
    one, (*rows, num_inputs) = FORMATS[name], weight.shape
    blocks = one.blocks(num_inputs)
    codes = torch.empty(*rows, one.num_codes(blocks), dtype=one.codes)
    scales = torch.empty(*rows, blocks)
    for place in range(len(weight)) if weight.dim() == 3 else (...,):
        encode(one, weight[place], codes[place], scales[place])
    codes = codes[..., : num_inputs * one.bits // 8].contiguous()
    if one.square:
        return codes.view(torch.float8_e4m3fn), scales[..., ::BLOCK, :].contiguous()
    return codes, scales


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
