"""Sequences by hand: what is input, what is a target, what is an image, what is cut."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from PIL import Image

from gemoe_ds.data.collate import Collator
from gemoe_ds.data.sample import Turn, of_turns, write_samples
from gemoe_ds.data.train_tokenizer import train_tokenizer
from gemoe_ds.errors import ConfigError, DataError, SampleError
from gemoe_ds.models.chat import ChatTemplate
from gemoe_ds.models.images import SquareImages
from gemoe_ds.models.tokenizer import load_tokenizer
from tests.tiny import WORDS, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def make(tokenizer, max_length=64):
    return Collator(tokenizer, SquareImages(4, 2, 3), ChatTemplate(), max_length=max_length)


def image(colour=(255, 0, 127), size=(4, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def words(ids) -> str:
    return " ".join(WORDS[i] for i in ids)


TWO = (Turn("a b", "c"), Turn("d", "e f"))


def test_a_sequence_by_hand(tokenizer):
    collator = make(tokenizer)
    batch = collator.batch([collator.encode(5, of_turns("x", image(), TWO))])
    assert words(batch.input_ids_BS[0]) == (
        "<s> <image> <image> USER: a b ASSISTANT: c </s> USER: d ASSISTANT: e f </s>"
    )
    targets = [WORDS[i] if i >= 0 else "." for i in batch.labels_BS[0].tolist()]
    assert " ".join(targets) == ". . . . . . . c </s> . . . e f </s>"
    assert batch.turn_BS[0].tolist() == [-1] * 7 + [0, -1, -1, -1, -1, 1, 1, -1]
    assert batch.is_vision_BS[0].nonzero().flatten().tolist() == [1, 2]
    assert (batch.rows, batch.ids, batch.num_targets) == ((5,), ("x",), 5)
    red = torch.tensor([1.0, -1.0, 127 / 127.5 - 1])
    torch.testing.assert_close(batch.images["pixels"], red[None, :, None, None].expand(1, 3, 4, 4))


def test_padding_stands_right_and_text_only_samples_see_a_dummy_image(tokenizer):
    collator = make(tokenizer)
    samples = [of_turns("t", None, TWO[:1]), of_turns("i", image(size=(9, 7)), TWO)]
    batch = collator.batch([collator.encode(i, s) for i, s in enumerate(samples)])
    assert batch.is_valid_BS.sum(1).tolist() == [7, 15]
    assert not batch.is_valid_BS[0, 7:].any() and (batch.labels_BS[0, 7:] == -100).all()
    assert batch.images["pixels"].shape == (1, 3, 4, 4)
    assert batch.images["feature_BS"][1, :4].tolist() == [-1, 0, 1, -1]
    two = collator.batch([collator.encode(i, samples[1]) for i in range(2)])
    assert two.images["pixels"].shape == (2, 3, 4, 4)
    assert two.images["feature_BS"][:, 1:3].tolist() == [[0, 1], [2, 3]]
    alone = collator.batch([collator.encode(0, samples[0])])
    assert alone.images["pixels"].shape == (1, 3, 4, 4), "a dummy one for the vision tower"
    assert (alone.images["feature_BS"] == -1).all()


@pytest.mark.parametrize("max_length", [10, 12, 14])
def test_long_conversations_end_at_a_turn(tokenizer, max_length):
    encoded = make(tokenizer, max_length=max_length).encode(0, of_turns("x", image(), TWO))
    assert words(encoded.input_ids) == "<s> <image> <image> USER: a b ASSISTANT: c </s>"


def test_cut_answers_and_targets_of_a_batch_are_those_of_all_samples(tokenizer):
    collator = make(tokenizer, 10)
    batch = collator.batch([collator.encode(i, of_turns(str(i), None, TWO)) for i in range(2)])
    assert batch.cut_answers == 2 and batch.num_targets == 4
    first = torch.full_like(batch.labels_BS, -100)
    first[:, 0] = 7
    assert replace(batch, labels_BS=first).num_targets == 0, "nothing predicts the first token"


@pytest.mark.parametrize("max_length, answer", [(8, "c d </s>"), (7, "c d"), (6, "c")])
def test_a_first_answer_that_does_not_fit_is_learned_in_part_but_not_graded(
    tokenizer, max_length, answer
):
    sample = of_turns("x", None, (Turn("a b", "c d"), Turn("e", "f")))
    collator = make(tokenizer, max_length=max_length)
    batch = collator.batch([collator.encode(0, sample)])
    assert words(batch.input_ids_BS[0]) == f"<s> USER: a b ASSISTANT: {answer}"
    assert words(i for i in batch.labels_BS[0].tolist() if i >= 0) == answer
    assert (batch.turn_BS[0] == 0).sum() == (2 if answer.endswith("</s>") else 0)


@pytest.mark.parametrize("max_length", [1, 4, 7])
def test_a_sample_without_a_target_is_named(tokenizer, max_length):
    """Seven tokens stand before the first answer."""
    said = f"sample x: no answer fits into data.max_length={max_length}: 7 tokens stand before"
    with pytest.raises(SampleError, match=said):
        make(tokenizer, max_length=max_length).encode(0, of_turns("x", image(), TWO))


def test_special_tokens_in_a_text_are_spelled_not_obeyed(tmp_path):
    """A </s> in a text would end an answer."""
    said = "the tags <s> </s> <pad>"
    sample = of_turns("x", image(), (Turn(said, f"{said}."),))
    write_samples([sample], tmp_path / "data", source="test")
    train_tokenizer([tmp_path / "data"], 300, tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    collator = make(tokenizer, max_length=512)
    batch = collator.batch([collator.encode(0, sample)])
    ids = batch.input_ids_BS[0]
    assert ids[:3].tolist() == [1, 3, 3] and ids[-1] == 2
    assert set(ids[3:-1].tolist()).isdisjoint(range(4)) and batch.is_vision_BS.sum() == 2
    assert tokenizer.decode(ids[3:-1]) == f"USER: {said}ASSISTANT: {said}."  # roles eat a space


def test_a_broken_image_names_its_sample(tokenizer):
    with pytest.raises(DataError, match="sample bad: its image cannot be decoded"):
        make(tokenizer).encode(0, of_turns("bad", image()[:40], TWO))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not a tokenizer folder"):
        load_tokenizer(tmp_path)
