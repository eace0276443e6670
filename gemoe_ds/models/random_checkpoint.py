"""A checkpoint at a published model's true shape, in its public layout, with random weights.

Where the public weights cannot be had, memory and time can still be measured on the real path.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gemoe_ds.console import Progress
from gemoe_ds.hf_io.companions import write_index
from gemoe_ds.hf_io.quantise_folder import say_quantised
from gemoe_ds.hf_io.quantised_tensor import OF_BLOCKS, scales_shape
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.few_bits import format_of
from gemoe_ds.models.images import ImageLayout

_STD, _LARGEST = 0.02, 448.0  # of all weights; of float8
_NOISE = 2**27  # numbers that all weights are cut from: drawing billions takes minutes


def write_random_checkpoint(
    backbone: type[Backbone], folder: Path, *, shards: int, float8: bool = False
) -> None:
    """Weights of standard deviation 0.02 and norms of 1 in bfloat16; config.json comes last.

    `float8`: in the layout in which Qwen publishes them so.
    """
    model = backbone.published()
    ours = {name: tuple(p.shape) for name, p in model.named_parameters()}
    key_map, narrow = backbone.keys, set[str]()
    if float8:
        key_map = key_map.one_expert_each
        names = format_of(backbone(backbone.Config()), model, "float8")
        narrow = {piece.key for name in names for piece in key_map.of(name, ours[name])}
    shapes = {**key_map.stored_shapes(ours), **backbone.published_unused}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_NOISE, generator=generator).mul_(_STD).bfloat16()
    codes = (noise.float() * (_LARGEST / (8 * _STD))).to(torch.float8_e4m3fn) if float8 else noise
    folder.mkdir(parents=True, exist_ok=True)
    keys, weight_map = list(shapes), {}
    size = -(-len(keys) // shards)
    for number in Progress(range(shards), desc="writing", unit="shard"):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {}
        for place, key in enumerate(keys[number * size : (number + 1) * size]):
            items = torch.Size(shapes[key]).numel()
            start = min(4096 * place, max(0, _NOISE - items))
            pool = codes if key in narrow else noise
            weight = pool[start : start + items].repeat(-(-items // _NOISE))[:items]
            if "norm" in key and key.endswith("weight"):
                weight = torch.ones_like(weight)
            tensors[key] = weight.view(shapes[key]).clone()
            weight_map[key] = name
            if key in narrow:
                scales = torch.full(scales_shape("float8", shapes[key]), 8 * _STD / _LARGEST)
                tensors[key + OF_BLOCKS], weight_map[key + OF_BLOCKS] = scales, name
        save_file(tensors, folder / name, metadata={"format": "pt"})
    write_index(folder, weight_map)
    config: Any = model.config
    if hasattr(config, "to_json"):
        (folder / "config.json").write_text(json.dumps(config.to_json(), indent=1))
    else:
        config.dtype = torch.bfloat16
        config.save_pretrained(folder)
    if backbone.published_processor:
        path = folder / "preprocessor_config.json"
        path.write_text(json.dumps(dict(backbone.published_processor), indent=1))
    if float8:
        say_quantised(folder / "config.json", {"float8"}, shapes.keys() - narrow)


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
