"""Samples with pictures in any question are what the models' own code makes of them."""

from __future__ import annotations

import itertools
import json
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from gemoe_ds.data.collate import IGNORE, Collator
from gemoe_ds.data.images import decode_image
from gemoe_ds.data.turn import MARK, Message, Picture, Sample
from gemoe_ds.errors import ImageError, SampleError
from gemoe_ds.models.chat import ChatTemplate
from gemoe_ds.models.tokenizer import load_tokenizer
from tests.data.ragged import Asked, encoded_picture, ragged
from tests.data.test_prompts import TEMPLATE, Stock, unpacked
from tests.models.collators import LAYOUTS, make_collator, picture
from tests.tiny import write_tokenizer

GOLDEN = json.loads(
    (Path(__file__).parent.parent / "models/golden/prompts.json").read_text(encoding="utf-8")
)
SYSTEM = {"deepseek_vl2", "qwen3_vl_moe", "moe_llava_stablelm", "moe_llava_qwen", "olmoe"}
MOST = {"olmoe": 0, "molmoe": 0}  # pictures in any place


@pytest.fixture(scope="module")
def collators(tmp_path_factory):
    return cache(lambda name: make_collator(name, tmp_path_factory.mktemp("own") / name))


def draw(name: str, seed: int) -> tuple[Sample, list[Asked]]:
    """One that ends with an answer that is learned: what follows it is left out."""
    options = {"pictures": MOST.get(name, 4), "system": name in SYSTEM, "texts": False}
    sample, asked = ragged(random.Random(seed), "x", **options)
    return sample, asked


def up_to_last(sample: Sample) -> list[Message]:
    last = max(place for place, message in enumerate(sample.messages) if message.loss)
    return list(sample.messages[: last + 1])


def published(
    name: str, collator, sample: Sample, asked: list[Asked], ends: tuple[int, int] = (0, 1)
) -> list[int]:
    """Ids as every model's own code has them; texts here have no special token in them. `ends`:
    DeepSeek's begin and end of a sequence."""
    messages, asked = up_to_last(sample), iter(asked)
    tokenizer, layout, places = collator.tokenizer, collator.layout, itertools.count()
    end = tokenizer.decode(collator.encode(0, sample).input_ids[-1:])
    chat = collator.conversations.chat

    def with_images(text: str) -> list[int]:
        """moellava/mm_utils.py, deepseek_vl2's tokenize_with_images: cut, each part by itself."""
        ids = []
        for place, part in enumerate(text.split(MARK)):
            if place:
                ids += layout(decode_image(sample, next(places)), len(sample.images)).input_ids
            ids += tokenizer(part, add_special_tokens=False)["input_ids"]
        return ids

    if name == "deepseek_vl2":
        ids = [ends[0]]
        for message in messages:
            if message.role == "user":
                ids += with_images(f"<|User|>: {message.content.strip()}\n\n<|Assistant|>:")
            elif message.role == "assistant":
                ids += [*tokenizer(message.content, add_special_tokens=False)["input_ids"], ends[1]]
            else:
                ids += with_images(message.content)
        return ids
    if name.startswith("moe_llava"):
        first = messages.pop(0).content + " " if messages[0].role == "system" else chat.start
        for message in messages:
            if message.role == "user":
                one = next(asked)
                before = MARK * one.before + "\n" * bool(one.before and not one.inside)
                first += f"USER: {before}{MARK.join([one.text, *one.inside])} ASSISTANT:"
            else:
                first += f" {message.content}{end}"
        return with_images(first)
    assert name == "olmoe"
    text = "<|endoftext|>"
    for message in messages:
        text += {
            "system": f"<|system|>\n{message.content}\n",
            "user": f"<|user|>\n{message.content}\n<|assistant|>\n",
            "assistant": f"{message.content}<|endoftext|>\n",
        }[message.role]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def without_space(text: str) -> str:
    return "".join(text.split())


def by_processor(collator, sample: Sample, asked: list[Asked]) -> dict:
    """transformers' Qwen3VLProcessor of a conversation."""
    messages, asked, said = up_to_last(sample), iter(asked), []
    for message in messages:
        content: str | list = message.content
        if message.role == "user":
            one, content = next(asked), []
            for part in [
                *[None] * one.before,
                one.text,
                *(p for t in one.inside for p in (None, t)),
            ]:
                content.append(
                    {"type": "image"} if part is None else {"type": "text", "text": part}
                )
        said.append({"role": message.role, "content": content})
    template = TEMPLATE.partition("{{ '<|im_start|>assistant")[0]
    tokenizer = collator.tokenizer
    prompt = tokenizer.apply_chat_template(said, chat_template=template, tokenize=False)
    images = [decode_image(sample, n) for n in range(prompt.count("<|image_pad|>"))]
    processor = Stock(collator.layout.processor, tokenizer, None)
    return processor(text=[prompt], images=images or None, return_tensors="np")


@pytest.mark.parametrize("name", sorted(LAYOUTS.keys() - {"molmoe"}))
def test_ids_targets_and_pixels(collators, name):
    """Up to four pictures in any of up to four questions."""
    collator, shown = collators(name), 0
    template, eos = collator.conversations.chat.answer, collator.tokenizer.eos_token

    def of_answer(text: str) -> str:
        return template.format(text=text, end="", eos=eos)

    for seed in range(12):
        sample, asked = draw(name, seed)
        encoded = collator.encode(0, sample)
        if name == "qwen3_vl_moe":
            stock = by_processor(collator, sample, asked)
            ids = stock["input_ids"][0].tolist()
            if encoded.images:
                pixels = np.concatenate([image.pixels for image in encoded.images])
                np.testing.assert_array_equal(pixels, stock["pixel_values"])
        else:
            ids = published(name, collator, sample, asked)
        assert encoded.input_ids == ids, sample.messages
        answers = [answer.content for answer in sample.answers]
        written = collator.tokenizer.decode([label for label in encoded.labels if label != IGNORE])
        assert without_space(written) == without_space("".join(map(of_answer, answers)))
        for index, answer in enumerate(answers):
            graded = [i for i, turn in zip(ids, encoded.turn, strict=True) if turn == index]
            assert collator.tokenizer.decode(graded).strip() == answer
        features, first = [], 0
        for place, image in enumerate(encoded.images):
            alone = collator.layout(decode_image(sample, place), len(sample.images))
            np.testing.assert_array_equal(image.pixels, alone.pixels)
            features += [first + row if row >= 0 else -1 for row in alone.feature_P.tolist()]
            first += alone.num_features
        seen = [f for f, there in zip(encoded.feature, encoded.is_vision, strict=True) if there]
        assert seen == features and {*encoded.feature} - {*features} <= {-1}
        shown += len(encoded.images)
    assert shown > 15 or name == "olmoe"


@pytest.mark.parametrize("title", sorted(GOLDEN["deepseek_vl2"]["cases"].keys() - {"mmmu"}))
def test_deepseeks_own_prompts_as_samples(collators, title):
    case, collator = GOLDEN["deepseek_vl2"]["cases"][title], collators("deepseek_vl2")
    system = [Message("system", case["system"])] if case["system"] else []
    talk = (Message("user", case["text"]), Message("assistant", "Yes."))
    images = tuple(Picture(picture(*size), *size) for size in case["sizes"])
    sample = Sample("x", (*system, *talk), images)
    prompt = collator.prompt(0, sample)
    assert prompt.input_ids == unpacked(case["ids"])
    assert collator.encode(0, sample).input_ids[: len(prompt.input_ids)] == prompt.input_ids
    tiles = [int(image.extras["tiles"][0]) - 1 for image in prompt.images]
    assert tiles == [wide * high for wide, high in case["tiles"]]


def test_molmoe_reads_one_picture_before_all_text(collators):
    """As its own code lays it, wherever in the first question the mark stands."""
    collator, image = collators("molmoe"), Picture(encoded_picture(40, 30), 40, 30)
    answer = (Message("assistant", "Yes."),)

    def ids(*contents: str) -> list[int]:
        talk = [m for content in contents for m in (Message("user", content), *answer)]
        number = "".join(contents).count(MARK)
        return collator.encode(0, Sample("x", tuple(talk), (image,) * number)).input_ids

    usual = ids("<image>\nWhat is it?")
    assert usual == ids("<image>What is it?") == ids("What is it?\n<image>")
    assert ids("What <image>is it?", "And?")[: len(usual)] == usual
    with pytest.raises(SampleError, match="x: it shows 2 pictures, and this model reads one"):
        ids("<image><image>\nWhich?")
    with pytest.raises(SampleError, match="its picture is in a later question"):
        ids("Hello", "<image>\nWhat?")


ENDS = {
    "olmoe": ([50279], [50279]),
    "molmoe": ([50279], [50279]),
    "deepseek_vl2": ([0], [1]),
    "qwen3_vl_moe": ([], [151643]),
    "moe_llava_qwen": ([], [151643]),
    "moe_llava_stablelm": ([], [100257]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_plain_text_has_no_template(collators, name):
    """What it begins and ends with is what the model's own documents do."""
    collator, text = collators(name), "What is it? <|user|> A dog.\n"
    encoded = collator.encode(0, Sample("x", (Message("text", text),)))
    begin, end = ENDS[name]
    split = {"add_special_tokens": False, "split_special_tokens": True}
    ids = [*begin, *collator.tokenizer([text], **split)["input_ids"][0], *end]
    assert encoded.input_ids == ids
    assert encoded.labels == [IGNORE, *ids[1:]] and {*encoded.turn} == {-1}
    with pytest.raises(SampleError, match="is a plain text, in which no answer is asked"):
        collator.prompt(0, Sample("x", (Message("text", text),)))


def test_a_tokenizer_without_the_end_of_documents_is_named(tmp_path):
    chat = ChatTemplate(document="{text}{end}<eod>", stops=("<eod>",))
    collator = Collator(load_tokenizer(write_tokenizer(tmp_path)), None, chat, max_length=9)
    with pytest.raises(SampleError, match="a plain text and needs <eod>, which the tok"):
        collator.encode(0, Sample("x", (Message("text", "a"),)))


def test_what_cannot_be_read_is_named(collators):
    talk = (Message("user", "a"), Message("assistant", "b"))
    with pytest.raises(SampleError, match="x: it has a system message, and this model's chat has"):
        collators("molmoe").encode(0, Sample("x", (Message("system", "s"), *talk)))
    with pytest.raises(SampleError, match="x: its messages are neither"):
        collators("molmoe").encode(0, Sample("x", talk[:1]))
    see = (Message("user", "<image><image>a"), talk[1])
    whole, other = Picture(encoded_picture(40, 30), 40, 30), Picture(encoded_picture(1, 1), 40, 30)
    with pytest.raises(ImageError, match="picture 2 cannot be .* it has 1 x 1 pixels, and 40"):
        collators("deepseek_vl2").encode(0, Sample("x", see, (whole, other)))


def test_the_number_of_pictures_of_the_whole_conversation_decides(collators):
    """DeepSeek-VL2 cuts two of them into tiles, and none of three, in whatever turns they stand."""
    collator = collators("deepseek_vl2")
    image = Picture(encoded_picture(500, 90), 500, 90)
    for number, tiles in ((1, True), (2, True), (3, False)):
        messages = []
        for _ in range(number):
            messages += [Message("user", "<image>\nWhat?"), Message("assistant", "It.")]
        encoded = collator.encode(0, Sample("x", tuple(messages), (image,) * number))
        counts = {int(laid.extras["tiles"][0]) for laid in encoded.images}
        assert (counts != {2}) == tiles and len(encoded.images) == number
