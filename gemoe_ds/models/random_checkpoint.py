"""A checkpoint at a published model's true shape, in its public layout, with random weights.

Where the public weights cannot be had, memory and time can still be measured on the real path. Or
with no weights at all: the headers tell what a run would need.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from gemoe_ds.console import Progress
from gemoe_ds.hf_io.companions import write_index
from gemoe_ds.hf_io.key_rules import Shape
from gemoe_ds.hf_io.quantise_folder import say_quantised
from gemoe_ds.hf_io.quantised_tensor import OF_BLOCKS, scales_shape
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.few_bits import format_of
from gemoe_ds.models.images import ImageLayout

_STD, _LARGEST = 0.02, 448.0  # of all weights; of float8
_NOISE = 2**27  # numbers that all weights are cut from: drawing billions takes minutes
_ITEM_BYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4}


def write_random_checkpoint(
    backbone: type[Backbone], folder: Path, *, shards: int, float8: bool = False
) -> None:
    """Weights of standard deviation 0.02 and norms of 1 in bfloat16; config.json comes last.

    `float8`: in the layout in which Qwen publishes them so.
    """
    published = _Published.of(backbone, float8=float8)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_NOISE, generator=generator).mul_(_STD).bfloat16()
    codes = (noise.float() * (_LARGEST / (8 * _STD))).to(torch.float8_e4m3fn) if float8 else noise
    folder.mkdir(parents=True, exist_ok=True)
    files = published.files(shards)
    for name in Progress(files, desc="writing", unit="shard"):
        tensors = {}
        for place, key in enumerate(files[name]):
            shape = published.shapes[key]
            items = torch.Size(shape).numel()
            start = min(4096 * place, max(0, _NOISE - items))
            pool = codes if key in published.narrow else noise
            weight = pool[start : start + items].repeat(-(-items // _NOISE))[:items]
            if "norm" in key and key.endswith("weight"):
                weight = torch.ones_like(weight)
            tensors[key] = weight.view(shape).clone()
            if key in published.narrow:
                scales = torch.full(scales_shape("float8", shape), 8 * _STD / _LARGEST)
                tensors[key + OF_BLOCKS] = scales
        save_file(tensors, folder / name, metadata={"format": "pt"})
    published.write_rest(folder, files)


def write_headers(
    backbone: type[Backbone], folder: Path, *, shards: int, float8: bool = False
) -> None:
    """The same folder without the weights: files of true size that hold headers, and no blocks.

    For what looks at shapes alone, as `gemoe train --estimate` does.
    """
    published = _Published.of(backbone, float8=float8)
    folder.mkdir(parents=True, exist_ok=True)
    files = published.files(shards)
    for name, keys in files.items():
        header, end = {}, 0
        for key, kind, shape in published.stored(keys):
            begin, end = end, end + torch.Size(shape).numel() * _ITEM_BYTES[kind]
            header[key] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / name, 8 + len(text) + end)
    published.write_rest(folder, files)


@dataclass(frozen=True)
class _Published:
    """What a public folder has: shapes by key, and which of the keys are in float8."""

    backbone: type[Backbone]
    model: nn.Module  # on meta
    shapes: dict[str, Shape]
    narrow: set[str]

    @classmethod
    def of(cls, backbone: type[Backbone], *, float8: bool) -> _Published:
        model = backbone.published()
        ours = {name: tuple(p.shape) for name, p in model.named_parameters()}
        key_map, narrow = backbone.keys, set[str]()
        if float8:
            key_map = key_map.one_expert_each
            names = format_of(backbone(backbone.Config()), model, "float8")
            narrow = {piece.key for name in names for piece in key_map.of(name, ours[name])}
        shapes = {**key_map.stored_shapes(ours), **backbone.published_unused}
        return cls(backbone, model, shapes, narrow)

    def files(self, number: int) -> dict[str, list[str]]:
        """Which keys are in which of so many files; their scales are there too."""
        keys = list(self.shapes)
        size = -(-len(keys) // number)
        parts = [keys[size * place : size * (place + 1)] for place in range(number)]
        names = [f"model-{place + 1:05d}-of-{number:05d}.safetensors" for place in range(number)]
        return dict(zip(names, parts, strict=True))

    def stored(self, keys: Iterable[str]) -> Iterator[tuple[str, str, Shape]]:
        """Key, dtype and shape of all tensors of these keys."""
        for key in keys:
            shape = self.shapes[key]
            yield key, "F8_E4M3" if key in self.narrow else "BF16", shape
            if key in self.narrow:
                yield key + OF_BLOCKS, "F32", scales_shape("float8", shape)

    def write_rest(self, folder: Path, files: Mapping[str, list[str]]) -> None:
        """The index, what the images need, and config.json."""
        stored = {name: [key for key, _, _ in self.stored(keys)] for name, keys in files.items()}
        write_index(folder, {key: name for name, keys in stored.items() for key in keys})
        if self.backbone.published_processor:
            path = folder / "preprocessor_config.json"
            path.write_text(json.dumps(dict(self.backbone.published_processor), indent=1))
        config: Any = self.model.config
        if hasattr(config, "to_json"):
            (folder / "config.json").write_text(json.dumps(config.to_json(), indent=1))
        else:
            config.dtype = torch.bfloat16
            config.save_pretrained(folder)
        if self.narrow:
            say_quantised(folder / "config.json", {"float8"}, self.shapes.keys() - self.narrow)


def write_stand_in_tokenizer(
    backbone: type[Backbone],
    words: Iterable[str],
    folder: Path,
    layout: ImageLayout | None = None,
) -> None:
    """A tokenizer of whole words that has what the backbone's chat names, where the model has it.

    The public tokenizers cannot be had either; sequences are built as they would be with them.
    `layout`: of its images, by default that of the published model.
    """
    layout = layout or backbone(backbone.Config()).image_layout(backbone.published())
    chat = backbone.chat
    specials = [*chat.specials, *([layout.token[0]] if layout and layout.token else [])]
    spelled = [*chat.pieces(chat.question), *chat.pieces(chat.question_with_image)]
    spelled += chat.pieces(chat.answer)
    around = {word for text in spelled for word in text.split() if "{" not in word}
    known = ["<pad>", "<s>", "</s>", *sorted({*words, *around} - {*specials})]
    ids = {word: place for place, word in enumerate(dict.fromkeys([*known, *specials]))}
    ids |= {token: place for token, place in chat.added.items() if token in ids}
    if layout and layout.token:
        ids[layout.token[0]] = layout.token[1]
    write_word_tokenizer(ids, specials, folder)


def write_word_tokenizer(ids: dict[str, int], specials: Iterable[str], folder: Path) -> None:
    """Words between spaces, by id; <pad>, also for unknown words, <s> and </s> are among them."""
    tokenizer = Tokenizer(models.WordLevel(ids, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=list(specials),
    )
    fast.save_pretrained(folder)
