"""Prompts with any number of pictures are those of every model's own code; long ones are cut.

models/golden/prompts.json: values that the code named there printed, as models/golden/chats.json.
"""

from __future__ import annotations

import io
import json
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import Qwen3VLProcessor

from gemoe_ds.data.prompts import PromptEncoder, Question
from gemoe_ds.errors import ConfigError, ImageError, SampleError
from tests.models.collators import make_collator, picture, shown

GOLDEN = json.loads(
    (Path(__file__).parent.parent / "models/golden/prompts.json").read_text(encoding="utf-8")
)
TEMPLATE = (  # of Qwen/Qwen3-VL-30B-A3B-Instruct, without tools and videos
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return cache(
        lambda name: PromptEncoder(make_collator(name, tmp_path_factory.mktemp("own") / name))
    )


def unpacked(runs) -> list[int]:
    pairs = [run if isinstance(run, list) else (run, 1) for run in runs]
    return [token for token, times in pairs for _ in range(times)]


def pixels_of(encoded) -> np.ndarray:
    return np.concatenate([image.pixels for image in encoded.images])


@pytest.mark.parametrize("title", sorted(GOLDEN["deepseek_vl2"]["cases"].keys() - {"mmmu"}))
def test_deepseek_cuts_up_to_two_pictures_into_tiles(encoder, title):
    case = GOLDEN["deepseek_vl2"]["cases"][title]
    pictures = [shown(*size) for size in case["sizes"]]
    question = Question(case["text"], system=case["system"])
    encoded = encoder("deepseek_vl2").chat(question, pictures, room=9999)
    assert encoded.input_ids == unpacked(case["ids"])
    assert [int(image.extras["tiles"][0]) - 1 for image in encoded.images] == [
        wide * high for wide, high in case["tiles"]
    ]
    means = pixels_of(encoded).mean((1, 2, 3))
    np.testing.assert_allclose(means, case["means"], atol=2e-6)
    if case["text"].startswith("<image>\n"):  # as it stands where the text has no marks
        text = case["text"].replace("<image>\n", "")
        again = encoder("deepseek_vl2").chat(
            Question(text, system=case["system"]), pictures, room=9999
        )
        assert again.input_ids == encoded.input_ids


class Stock(Qwen3VLProcessor):
    """Without videos, for which transformers wants torchvision."""

    def check_argument_for_proper_class(self, name, argument):
        return type(argument)


@pytest.mark.parametrize("seed", range(6))
def test_qwen3_vl_is_its_own_processor(encoder, seed):
    draw, own = random.Random(seed), encoder("qwen3_vl_moe")
    pictures = [
        shown(draw.randint(3, 400), draw.randint(3, 400)) for _ in range(draw.randint(1, 8))
    ]
    words = [" ".join(draw.choices(["what", "is  ", "\nthe", "<|ref|>"], k=3)) for _ in "ab"]
    images = [{"type": "image"} for _ in pictures]
    if seed % 2:
        content, text = [*images, {"type": "text", "text": words[0]}], words[0]
    else:  # marks, two of them for the last picture, which is shown twice
        marks = [*range(len(pictures)), len(pictures) - 1]
        text = words[0] + " and ".join(f"<image {2 * n + 1}>" for n in marks) + words[1]
        between = [w for _ in marks for w in ({"type": "image"}, {"type": "text", "text": " and "})]
        content = [{"text": words[0]}, *between[:-1], {"text": words[1]}]
        pictures_shown = [pictures[n] for n in marks]
    pictures_shown = pictures if seed % 2 else pictures_shown
    system = [{"role": "system", "content": "You are a helpful assistant."}] * (seed < 3)
    tokenizer = own.collator.tokenizer
    prompt = tokenizer.apply_chat_template(
        [*system, {"role": "user", "content": content}], chat_template=TEMPLATE, tokenize=False
    )
    stock = Stock(own.collator.layout.processor, tokenizer, None)(
        text=[prompt], images=[p.convert("RGB") for p in pictures_shown], return_tensors="np"
    )
    encoded = own.chat(
        Question(text, system=system[0]["content"] if system else None), pictures, room=99999
    )
    assert encoded.input_ids == stock["input_ids"][0].tolist()
    np.testing.assert_array_equal(pixels_of(encoded), stock["pixel_values"])
    grids = np.concatenate([image.extras["grid_thw"] for image in encoded.images])
    np.testing.assert_array_equal(grids, stock["image_grid_thw"])
    assert np.flatnonzero(encoded.is_vision).size == (
        (stock["mm_token_type_ids"] == 1).sum() + 2 * len(pictures_shown)
    )


@pytest.mark.parametrize("name", ["moe_llava_stablelm", "moe_llava_qwen"])
@pytest.mark.parametrize("text", ["what is it", "in <image>, not <image>:"])
def test_moe_llava_tokenises_what_stands_between_its_pictures(encoder, name, text):
    """As tokenizer_image_token of moellava/mm_utils.py does it, and cli_multi.py without marks."""
    own = encoder(name)
    marked = text if "<image>" in text else f"<image><image>\n{text}"
    prompt = f"{own.collator.conversations.chat.start}USER: {marked} ASSISTANT:"
    chunks = [own.collator.tokenizer(c, add_special_tokens=False) for c in prompt.split("<image>")]
    ids = chunks[0]["input_ids"]
    for chunk in chunks[1:]:
        ids = ids + [0] * 576 + chunk["input_ids"]
    encoded = own.chat(Question(text), [shown(9, 7), shown(7, 9)], room=9999)
    assert encoded.input_ids == ids
    assert encoded.feature[encoded.feature.index(576) :].count(-1) > 0
    assert [f for f in encoded.feature if f >= 0] == list(range(2 * 576))


def test_molmoe_reads_one_picture_before_everything(encoder):
    own = encoder("molmoe")
    asked = own.chat(Question("what is <image 1>?", lead="vqa2: "), [shown(50, 40)], room=9999)
    chat = own.collator.tokenizer(" User: vqa2: what is <image 1>? Assistant:")["input_ids"]
    assert asked.input_ids[-len(chat) :] == chat
    assert asked.input_ids[0] == 50279 and sum(asked.is_vision) == len(
        asked.input_ids[1 : -len(chat)]
    )
    with pytest.raises(SampleError, match="mmmu 3: it shows 2 pictures, and this model reads one"):
        own.chat(Question("a"), [shown(5, 4)] * 2, room=9999, name="mmmu 3")


def test_marks_that_do_not_fit_the_pictures_are_text(encoder):
    own = encoder("qwen3_vl_moe")
    for text in ("a <image> b <image>", "<image 1> and <image 2>", "no mark"):
        marked = own.chat(Question(text), [shown(40, 40)], room=999)
        before = own.chat(Question(text, in_place=False), [shown(40, 40)], room=999)
        assert marked.input_ids == before.input_ids and sum(marked.is_vision) == 66
        assert own.collator.tokenizer.decode(before.input_ids).count(text) == 1
        assert own.chat(Question(text), room=999).images == []


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "deepseek_vl2", "moe_llava_qwen"])
def test_a_long_prompt_loses_the_beginning_of_its_text(encoder, name):
    """The template, the pictures, a style prefix and the last words stay, whatever the room."""
    own, pictures = encoder(name), [shown(40, 40), shown(70, 40)]
    around = {"lead": "style: ", "system": "Be brief.", "answer_so_far": "It is"}
    question = Question("the first <image> are the oldest <image> and these the last", **around)

    def said(encoded) -> str:
        pairs = zip(encoded.input_ids, encoded.is_vision, strict=True)
        return own.collator.tokenizer.decode([token for token, seen in pairs if not seen])

    whole = own.chat(question, pictures, room=9999)
    bare = own.chat(Question("<image><image>", **around), pictures, room=9999)
    least = len(bare.input_ids)
    assert whole.cut_tokens == 0 and least < len(whole.input_ids) - 9
    for room in range(least, len(whole.input_ids)):
        cut = own.chat(question, pictures, room=room)
        assert room - 3 <= len(cut.input_ids) <= room
        assert cut.cut_tokens == len(whole.input_ids) - len(cut.input_ids)
        assert sum(cut.is_vision) == sum(whole.is_vision)
        start, _, end = said(cut).partition("style: ")
        assert said(whole).startswith(start) and said(whole).endswith(end.lstrip())
    with pytest.raises(
        SampleError, match=r"pope 7: [\d,]+ tokens are left .*pictures: 2\)"
    ) as error:
        own.chat(question, pictures, room=least - 1, name="pope 7")
    assert error.value.needs == least


def test_what_a_model_cannot_read_is_named(encoder):
    with pytest.raises(
        SampleError, match="vqa 2: it shows a picture, and this backbone reads text"
    ):
        encoder("olmoe").chat(Question("a"), [shown(4, 4)], room=99, name="vqa 2")
    with pytest.raises(ConfigError, match="no system message"):
        encoder("molmoe").chat(Question("a", system="b"), room=99)
    broken = Image.open(io.BytesIO(picture(40, 40)[:70]))
    with pytest.raises(ImageError, match="vqa 3: its picture 2 cannot be read"):
        encoder("deepseek_vl2").chat(Question("a"), [shown(4, 4), broken], room=999, name="vqa 3")
