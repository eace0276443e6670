"""Padding on either side, and keys and values of tokens before: the same hidden states."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from gemoe_ds.data.bad_samples import BadSample
from gemoe_ds.data.collate import Collator
from gemoe_ds.data.prompts import PromptEncoder, Question
from gemoe_ds.data.sample import Turn, of_turns
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.inputs import ModelInputs
from gemoe_ds.models.kv_cache import DecodeState
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.moe.router import Router
from tests.models import reference
from tests.models.cases import CASES, write_case
from tests.tiny import make_model, write_base

NAMES = ["tiny", *CASES]


@pytest.fixture(scope="module", params=NAMES)
def loaded(request, tmp_path_factory):
    """A GeMoE model in evaluation, and a collator for it."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "tiny":
        base = write_base(folder)
        model = make_model(base)
    else:
        base = write_case(request.param, folder)
        backbone, router = Backbone.named(request.param), Router.named("gemoe")
        torch.manual_seed(0)
        model = MoEModel.from_checkpoint(
            backbone(backbone.Config()), *base, (router, router.Config())
        )
    tokenizer = AutoTokenizer.from_pretrained(base[1])
    model.double()  # float32 rounds the sums of one order and of another up to 1.2e-5 apart
    return model.eval(), Collator(
        tokenizer, model.image_layout, model.backbone.chat, max_length=3000
    )


def samples(sees: bool):
    """Long and short, with an image and without, in one batch."""
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    pixels.save(buffer, "PNG")
    image = buffer.getvalue() if sees else None
    turns = [(Turn("a b c", "d"), Turn("e f", "g h i")), (Turn("j", "k"),), (Turn("l m", "n"),)]
    return [of_turns(f"s{i}", image if i != 1 else None, turns_) for i, turns_ in enumerate(turns)]


def hidden(model, batch, past=None):
    with torch.no_grad():
        return model.hidden(replace(batch.model_inputs, past=past))


def test_padding_on_the_left_or_right_or_none(loaded):
    model, collator = loaded
    encoded = [
        collator.encode(row, sample)
        for row, sample in enumerate(samples(model.image_layout is not None))
    ]
    alone = [hidden(model, collator.batch([e]))[0] for e in encoded]
    for left in (False, True):
        batch = collator.batch(encoded, left=left)
        assert bool(batch.is_valid_BS[:, 0].all()) != left
        for past in (None, DecodeState()):
            together = hidden(model, batch, past)
            assert torch.isfinite(together).all()
            for row, valid, expected in zip(together, batch.is_valid_BS, alone, strict=True):
                reference.assert_same(row[valid], expected)


def test_prompts_with_several_pictures_each(loaded):
    """Two, none and three side by side, and beside a row of padding: each as if it were alone."""
    model, collator = loaded
    encoder, rng = PromptEncoder(collator), np.random.default_rng(1)
    counts = (0, 0, 0) if model.image_layout is None else (2, 0, 3)
    counts = (1, 0, 1) if model.backbone.chat.one_image else counts
    encoded = []
    for count, text in zip(counts, ("a b <image 1> c <image 2>", "d e", "f"), strict=True):
        size = (count * 7 + 8, 30, 3)
        pictures = [Image.fromarray(rng.integers(0, 255, size, np.uint8)) for _ in range(count)]
        encoded.append(encoder.chat(Question(text), pictures, room=9999))
    alone = [hidden(model, collator.batch([e], left=True))[0] for e in encoded]
    silent = replace(encoded[1], bad=BadSample(0, "x", "left out"))
    for order in ((0, 1, 2), (2, 0, 1)):
        batch = collator.batch([silent, *(encoded[i] for i in order)], left=True)
        together = hidden(model, batch, DecodeState())[1:]
        assert torch.isfinite(together).all()
        for row, valid, i in zip(together, batch.is_valid_BS[1:], order, strict=True):
            reference.assert_same(row[valid], alone[i])


def test_a_row_of_padding_beside_one_that_is_padded_on_the_left(loaded):
    model, collator = loaded
    encoded = [collator.encode(row, sample) for row, sample in enumerate(samples(False))]
    batch = collator.batch(encoded, left=True)
    expected = hidden(model, batch)
    batch.is_valid_BS[0] = False
    ours = hidden(model, batch)
    for row in (1, 2):
        reference.assert_same(
            ours[row][batch.is_valid_BS[row]], expected[row][batch.is_valid_BS[row]]
        )


def test_token_by_token_equals_at_once(loaded):
    """The prompts with their images, then the rest in steps of one token; one ends early."""
    model, collator = loaded
    some = samples(model.image_layout is not None)
    whole = [collator.encode(row, sample) for row, sample in enumerate(some)]
    prompts = [collator.prompt(row, sample) for row, sample in enumerate(some)]
    expected = [hidden(model, collator.batch([e]))[0] for e in whole]
    past = DecodeState()
    batch = collator.batch(prompts, left=True)
    first = hidden(model, batch, past)
    for row, valid, all_ in zip(first, batch.is_valid_BS, expected, strict=True):
        reference.assert_same(row[valid], all_[: int(valid.sum())])
    rest = [w.input_ids[len(p.input_ids) :] for w, p in zip(whole, prompts, strict=True)]
    assert len({len(tokens) for tokens in rest}) > 1
    for step in range(max(map(len, rest))):
        ids = torch.tensor([[t[step] if step < len(t) else 0] for t in rest])
        valid = torch.tensor([[step < len(t)] for t in rest])
        with torch.no_grad():
            ours = model.hidden(ModelInputs(ids, valid, torch.zeros_like(valid), past=past))
        assert torch.isfinite(ours).all()
        for row, (prompt, tokens) in enumerate(zip(prompts, rest, strict=True)):
            if step < len(tokens):
                reference.assert_same(ours[row, 0], expected[row][len(prompt.input_ids) + step])
