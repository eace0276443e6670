"""Sequences by hand: what is input, what is a target, what is an image, what is cut."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from gemoe_ds.backbones.tokenizer import load_tokenizer
from gemoe_ds.data.collate import Collator
from gemoe_ds.data.sample import Sample, Turn
from gemoe_ds.errors import ConfigError, DataError
from tests.tiny import WORDS, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def make(tokenizer, max_length=64):
    return Collator(
        tokenizer, image_size=4, image_tokens=2, image_token_id=3, max_length=max_length
    )


def image(colour=(255, 0, 127), size=(4, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def words(ids) -> str:
    return " ".join(WORDS[i] for i in ids)


TWO = (Turn("a b", "c"), Turn("d", "e f"))


def test_a_sequence_by_hand(tokenizer):
    collator = make(tokenizer)
    batch = collator.batch([collator.encode(5, Sample("x", image(), TWO))])
    assert words(batch.input_ids_BS[0]) == (
        "<s> <image> <image> USER: a b ASSISTANT: c </s> USER: d ASSISTANT: e f </s>"
    )
    targets = [WORDS[i] if i >= 0 else "." for i in batch.labels_BS[0].tolist()]
    assert " ".join(targets) == ". . . . . . . c </s> . . . e f </s>"
    assert batch.turn_BS[0].tolist() == [-1] * 7 + [0, -1, -1, -1, -1, 1, 1, -1]
    assert batch.is_vision_BS[0].nonzero().flatten().tolist() == [1, 2]
    assert (batch.rows, batch.ids, batch.num_targets) == ((5,), ("x",), 5)
    red = torch.tensor([1.0, -1.0, 127 / 127.5 - 1])
    torch.testing.assert_close(batch.pixels_NCHW, red[None, :, None, None].expand(1, 3, 4, 4))


def test_padding_stands_right_and_text_only_samples_have_no_pixels(tokenizer):
    collator = make(tokenizer)
    samples = [Sample("t", None, TWO[:1]), Sample("i", image(size=(9, 7)), TWO)]
    batch = collator.batch([collator.encode(i, s) for i, s in enumerate(samples)])
    assert batch.is_valid_BS.sum(1).tolist() == [7, 15]
    assert not batch.is_valid_BS[0, 7:].any() and (batch.labels_BS[0, 7:] == -100).all()
    assert batch.pixels_NCHW.shape == (1, 3, 4, 4)
    alone = collator.batch([collator.encode(0, samples[0])])
    assert alone.pixels_NCHW.shape == (0, 3, 4, 4)


def test_long_conversations_end_at_a_turn(tokenizer):
    encoded = make(tokenizer, max_length=12).encode(0, Sample("x", image(), TWO))
    assert words(encoded.input_ids) == "<s> <image> <image> USER: a b ASSISTANT: c </s>"
    with pytest.raises(DataError, match="sample x: no answer fits into max_length=8"):
        make(tokenizer, max_length=8).encode(0, Sample("x", image(), TWO))


def test_a_broken_image_names_its_sample(tokenizer):
    with pytest.raises(DataError, match="sample bad: its image cannot be decoded"):
        make(tokenizer).encode(0, Sample("bad", image()[:40], TWO))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not a tokenizer folder"):
        load_tokenizer(tmp_path)
