"""A sample with two pictures, from its messages to logits, by the rule of each model's own code.

Qwen3-VL: transformers' processor and model. The others: the texts as their code writes them, cut at
the pictures, each part tokenised by itself; the features of a picture stand where it does; then the
formulas of the model. MolmoE reads one picture, OLMoE none (tests/data/test_pictures.py).
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Qwen3VLMoeForConditionalGeneration

from gemoe_ds.data.images import decode_image
from tests.data.ragged import ragged
from tests.data.test_pictures import by_processor, published
from tests.models import reference
from tests.models.deepseek_vl2 import test_model as deepseek
from tests.models.moe_llava import test_model as llava
from tests.models.test_packing import build

SEEN = -1  # in the place of a picture


def drawn(collator, number, system=False):
    """The first sample of so many pictures that is learned to its end."""
    rng = random.Random(1)
    while True:
        options = {"pictures": number, "system": system, "texts": False}
        sample, asked = ragged(rng, "x", **options)
        if len(sample.images) == number and sample.messages[-1].loss:
            return sample, asked


def logits_of(model, batch):
    with torch.no_grad():
        hidden = model.eval().hidden(batch.model_inputs)
        return model.backbone.head(model.hf)(hidden)[0]


def assert_same(ours, expected, other):
    """To rounding; `other`, with the pictures in each other's places, is another model's."""
    bound = 2e-5 * float(expected.abs().max())
    torch.testing.assert_close(ours.double(), expected.double(), rtol=0, atol=bound)
    assert (other - expected).abs().max() > 100 * bound


def parts_of(name, collator, sample, asked):
    """Token ids with SEEN in the place of each picture."""
    marked = SimpleNamespace(
        tokenizer=collator.tokenizer,
        encode=collator.encode,
        conversations=collator.conversations,
        layout=lambda image, number: SimpleNamespace(input_ids=[SEEN]),
    )
    ends = collator.tokenizer.bos_token_id, collator.tokenizer.eos_token_id
    return published(name, marked, sample, asked, ends)


def embedded(ids, table, pictures):
    pictures = iter(pictures)
    return torch.cat([next(pictures) if i == SEEN else table[i][None] for i in ids])


def of_tiles(weights, layout, image, number):
    """The view's lines, the separator, the mosaic's lines; each line ends with the newline."""
    laid, side = layout(image, number), layout.side
    tiles = [deepseek.features_by_hand(weights, p) for p in torch.from_numpy(laid.pixels).double()]
    newline, separator = weights["image_newline"][None], weights["view_seperator"][None]
    wide, high = (1, 1) if number > 2 else layout.best_resolution(*image.size)
    columns, rows = (1, 1) if number > 2 else (wide // layout.tile, high // layout.tile)
    assert len(tiles) == 1 + rows * columns
    lines = [torch.cat([tiles[0][side * y : side * y + side], newline]) for y in range(side)]
    lines.append(separator)
    for y in range(side * rows):
        of_row = tiles[1 + y // side * columns :][:columns]
        start = side * (y % side)
        lines += [*(tile[start : start + side] for tile in of_row), newline]
    return torch.cat(lines)


@pytest.mark.parametrize("number", [2, 3])
def test_deepseek_vl2(folders, number):  # noqa: F811
    """Two pictures are cut into tiles, three are not."""
    model, collator = build(folders, "deepseek_vl2")
    collator.max_length = 10**5
    sample, asked = drawn(collator, number)
    weights, layout = reference.read(folders("deepseek_vl2")[0]), collator.layout
    images = [decode_image(sample, place) for place in range(number)]
    pictures = [of_tiles(weights, layout, image, number) for image in images]
    ids = parts_of("deepseek_vl2", collator, sample, asked)
    table = weights["language.model.embed_tokens.weight"]
    ours = logits_of(model, collator.batch([collator.encode(0, sample)]))
    whole, swapped = (embedded(ids, table, shown) for shown in (pictures, pictures[::-1]))
    assert_same(
        ours, deepseek.logits_by_hand(weights, whole), deepseek.logits_by_hand(weights, swapped)
    )


@pytest.mark.parametrize("name", ["moe_llava_stablelm", "moe_llava_qwen"])
def test_moe_llava(folders, name):  # noqa: F811
    model, collator = build(folders, name)
    sample, asked = drawn(collator, 2)
    weights = reference.read(folders(name)[0])
    prefix, by_hand = (
        ("transformer", llava.qwen) if name.endswith("qwen") else ("model", llava.stablelm)
    )
    pixels = [collator.layout(decode_image(sample, place)).pixels[0] for place in range(2)]
    pictures = [
        llava.features_by_hand(weights, prefix, torch.from_numpy(p).double()) for p in pixels
    ]
    table = next(t for key, t in weights.items() if "embed_tokens" in key or "wte" in key)
    ids = parts_of(name, collator, sample, asked)
    ours = logits_of(model, collator.batch([collator.encode(0, sample)]))
    whole, swapped = (embedded(ids, table, shown) for shown in (pictures, pictures[::-1]))
    assert_same(ours, by_hand(weights, whole), by_hand(weights, swapped))


def test_qwen3_vl(folders):  # noqa: F811
    model, collator = build(folders, "qwen3_vl_moe")
    collator.max_length = 10**5
    sample, asked = drawn(collator, 2)
    inputs = by_processor(collator, sample, asked)
    folder = folders("qwen3_vl_moe")[0]
    stock = Qwen3VLMoeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    assert len(inputs["image_grid_thw"]) == 2
    ids = torch.from_numpy(np.asarray(inputs["input_ids"]))
    with torch.no_grad():
        expected = stock(
            ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.from_numpy(inputs["pixel_values"]),
            image_grid_thw=torch.from_numpy(inputs["image_grid_thw"]),
            mm_token_type_ids=(ids == collator.layout.token[1]).int(),
        ).logits[0]
    ours = logits_of(model, collator.batch([collator.encode(0, sample)]))
    assert_same(ours, expected, expected.flip(0))
