"""A row that holds what is not supported is dropped by name, never turned into something else."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from gemoe_ds.data.sample import Turn, of_turns
from gemoe_ds.data.sources.llava_rows import Unusable, notes, read_picture, read_turns

NAN = float("nan")


def talk(*messages: tuple, **more) -> dict:
    """A row of (speaker, value[, further keys]) messages."""
    conversations = [{"from": m[0], "value": m[1], **(m[2] if m[2:] else {})} for m in messages]
    return {"id": "1", "conversations": conversations, **more}


def human(text, **more) -> tuple:
    return ("human", text, more)


def gpt(text, **more) -> tuple:
    return ("gpt", text, more)


HI = (("human", "Hi"), ("gpt", "Hello"))
SEE = (("human", "<image>\nWhat?"), ("gpt", "A cat."))
TURN = (Turn("Hi", "Hello"),)


@pytest.mark.parametrize(
    "row",
    [
        talk(*HI, source="coco", model="g", width=640, bbox=[0, 0, 1, 1], score=0.3),
        talk(*HI, video=None, images=[], system="", tools=[], audio={}, weight=None),
        talk(*HI, weight=1, loss=True, train=1.0),
        talk(("human", "Hi", {"weight": 0}), ("gpt", "Hello", {"weight": 1, "loss": True})),
        talk(("human", "Hi", {"weight": 1, "train": False}), ("gpt", "Hello", {"train": True})),
        talk(*HI, image=None, image_path=None, label=3),
        talk(*HI, image_id=7, video_id="v", num_frames=9, masked=False),
        talk(("human", " Hi\r\n"), ("gpt", "\nHello ")),
    ],
)
def test_what_loses_nothing_is_used(row):
    assert read_turns(row, None) == TURN


def test_texts_stay_what_they_are():
    for text in ("use <video> and <img> tags", "</s> <|image_pad|>", "a\0b", "\ufeffx", "你好 🐈"):
        assert read_turns(talk(("human", "Hi"), ("gpt", text)), None) == (Turn("Hi", text),)
    assert read_turns(talk(("human", 'A <img src="a"> tag?'), ("gpt", "No")), None)
    assert read_turns(talk(*SEE, image="a.png", image_url="http://x"), None) == (
        Turn("What?", "A cat."),
    )


LOSS = "weights of the loss"
PICTURES = "a list of pictures"
SYSTEM = "a system prompt"
MARKERS = "other markers"


@pytest.mark.parametrize(
    "row, group, words",
    [
        (talk(*HI, video="a.mp4"), "video", "it has 'video', and video cannot be used yet"),
        (talk(*SEE, image="a.png", videos=["a"]), "video", "'videos'"),
        (talk(*HI, audio="a.wav"), "audio", "'audio'"),
        (talk(*HI, videoPath="a.mp4"), "video", "'videoPath'"),
        (talk(*SEE, image="a.png", frames=["a.png"]), "video", "'frames'"),
        (talk(*SEE, image="a.png", image_2="b.png"), PICTURES, "'image_2'"),
        (talk(*HI, systemPrompt="Be brief."), SYSTEM, "'systemPrompt'"),
        (talk(*HI, sample_weight=0), LOSS, "it has 'sample_weight': 0; every answer counts once"),
        (talk(("human", "Hi"), ("gpt", "Ho", {"compute_loss": False})), LOSS, "'compute_loss'"),
        (talk(("human", "Hi"), ("gpt", "Ho", {"is_masked": True})), LOSS, "'is_masked'"),
        (talk(*HI, System="Be brief."), SYSTEM, "'System'"),
        (talk(*HI, tools="[{}]"), "tools", "'tools'"),
        (talk(*HI, functions=[{"name": "f"}]), "tools", "'functions'"),
        (talk(*SEE, images=["a.png"]), PICTURES, "'images'"),
        (talk(*SEE, image="a.png", images=["a.png"]), PICTURES, "'images'"),
        (talk(*HI, rejected={"from": "gpt", "value": "No"}), "a preference", "'rejected'"),
        (talk(*HI, chosen_response="x"), "a preference", "'chosen_response'"),
        (talk(*HI, kto_tag=False), "a preference", "'kto_tag'"),
        (talk(*HI, label=False), "a preference", "'label'"),
        (talk(*HI, history=[["a", "b"]]), "earlier turns", "'history'"),
        (talk(*HI, messages=[{}]), "a second conversation", "'messages'"),
        (talk(*HI, image_path="a.png"), "picture elsewhere", "'image_path', not under 'image'"),
        (talk(*HI, Image="a.png"), "picture elsewhere", "under 'Image'"),
        (talk(*HI, weight=0), LOSS, "'weight': 0; every answer counts once"),
        (talk(HI[0], gpt("x", weight=0)), LOSS, "message 1 has 'weight': 0"),
        (talk(HI[0], gpt("x", weight=0.5)), LOSS, "0.5"),
        (talk(HI[0], gpt("x", weight=NAN)), LOSS, "nan"),
        (talk(HI[0], gpt("x", loss=False)), LOSS, "'loss': False"),
        (talk(HI[0], gpt("x", train="false")), LOSS, "'train': 'false'"),
        (talk(human("x", train=True), HI[1]), LOSS, "no question is learned"),
        (talk(HI[0], gpt("x", train_detail=[1])), "a mask of the loss", "'train_detail'"),
        (talk(HI[0], gpt("x", reasoning_content="y")), "reasoning", "message 1 has 'reasoning_"),
        (talk(human("x", image="b.png"), HI[1]), "a picture of its own", "message 0 has 'image'"),
        (talk(HI[0], gpt("x", content="y")), "a second text", "'content'"),
        (talk(HI[0], gpt("x", tool_calls=[{}])), "tools", "'tool_calls'"),
        (talk(("system", "s"), *HI), SYSTEM, "message 0 is from 'system', a system prompt"),
        (talk(*HI, ("System", "s"), gpt("x")), SYSTEM, "message 2 is from 'System'"),
        (talk(HI[0], ("function_call", "{}"), ("observation", "x"), HI[1]), "tools", "'funct"),
        (talk(gpt("Hello!"), *HI), "gpt speaks first", "remove what gpt says before"),
        (talk(HI[1], HI[0]), "gpt speaks first", "message 0 is from 'gpt', not from 'human'"),
        (talk(*HI, HI[0]), "not pairs", "from human, gpt, human"),
        (talk(HI[0], *HI, HI[1]), "not pairs", "from human, human, gpt, gpt"),
        (talk(), "not pairs", "from nobody"),
        (talk(("user", "Hi"), ("assistant", "x")), "other speakers", "called human and gpt"),
        (talk(HI[0], ("chatgpt", "x")), "other speakers", "'chatgpt', not from 'gpt'"),
        (talk(("Human", "Hi"), ("GPT", "x")), "other speakers", "'Human'"),
        (talk((None, "Hi"), HI[1]), "other speakers", "message 0 is from None"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages", "(role, content)"),
        ({"conversations": [{"role": "user", "content": "x"}]}, "messages", "write them as 'from'"),
        ({"instruction": "a", "output": "b"}, "alpaca", "(alpaca)"),
        ({"question": "a", "answer": "b"}, "no conversations", "its keys: question, answer"),
        ({}, "no conversations", "its keys: none"),
        ({"conversations": "[]"}, "not conversations", "conversations is '[]', not a list"),
        ({"conversations": [["q", "a"]]}, "not conversations", "message 0 is ['q', 'a'], not"),
        ([1, 2], "not an object", "the row is [1, 2]"),
        (None, "not an object", "the row is None"),
        (talk(HI[0], gpt(None)), "no text", "message 1 has no text"),
        (talk(HI[0], gpt(3)), "no text", "message 1 is 3, not a text"),
        (talk(HI[0], gpt(NAN)), "no text", "message 1 is nan, not a text"),
        (talk(("human", [{"type": "text"}]), HI[1]), "parts", "message 0 is a list of parts"),
        (talk(HI[0], gpt(" \n")), "empty answer", "an answer is empty"),
        (talk(*HI, image="a.png"), "picture without a marker", "expected 1 <image> in the first"),
        (talk(*SEE), "marker without a picture", "expected 0 <image>"),
        (talk(*HI, *SEE, image="a.png"), "picture in a later turn", "found it in messages 2"),
        (talk(human("<image><image>"), HI[1], image="a"), "several pictures", "in messages 0, 0"),
        (talk(human("<video>\nWhat?"), HI[1]), MARKERS, "holds the marker <video>"),
        (talk(human("< Audio >"), HI[1]), MARKERS, "holds the marker < Audio >"),
        (talk(human("<Image>"), HI[1]), MARKERS, "<Image>"),
        (talk(*HI, human("<|vision_start|><|image_pad|>"), HI[1]), MARKERS, "question 1"),
        (talk(human("<im_start><image><im_end>"), HI[1], image="a"), MARKERS, "<im_start>"),
        (talk(human("<image_1> <image-2>"), HI[1]), MARKERS, "<image_1>"),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_named(row, group, words):
    with pytest.raises(Unusable) as why:
        read_turns(row, None)
    assert words in str(why.value) and why.value.group == group
    assert len(str(why.value)) < 300


@pytest.mark.parametrize(
    "image, group, words",
    [
        (["a.png", "b.png"], "several pictures", "image is ['a.png', 'b.png'], not one file name"),
        ({"bytes": "x"}, "not a file name", "not one file name"),
        (NAN, "not a file name", "image is nan"),
        ("", "not a file name", "image is '', not one file name"),
        ("data:image/png;base64," + "A" * 9999, "not a file name", "image is data ('data:"),
        ("iVBORw0KGgo" * 500, "not a file name", "image is data"),
        ("https://example.com/a.png", "not a file name", "image is a URL"),
        ("s3://bucket/a.png", "not a file name", "image is a URL"),
        ("none.png", "picture missing", "image none.png: No such file or directory"),
        ("x" * 300, "picture missing", "File name too long"),
        ("text.png", "picture broken", "image text.png cannot be decoded: it has no header"),
        ("flat.jpg", "picture too small", "image flat.jpg is 3x9, smaller than 4"),
    ],
)  # fmt: skip
def test_pictures_that_cannot_be_used_are_named(tmp_path, image, group, words):
    (tmp_path / "text.png").write_text("<html>")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (9, 3)).save(tmp_path / "flat.jpg", exif=turned)
    with pytest.raises(Unusable) as why:
        read_picture({"image": image}, tmp_path, 4)
    assert words in str(why.value) and why.value.group == group
    assert len(str(why.value)) < 400


def test_notes_say_what_is_not_read_and_what_was_changed():
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    asked = ("human", "See <image> here", {"id": 3, "weight": 1})
    row = talk(asked, ("gpt", "x", {"id": 4}), image="a.gif", source="coco", model="", weight=1)
    assert list(notes(row, of_turns("1", buffer.getvalue(), ()))) == [
        "the key 'source' is ignored",
        "the key 'id' of a message is ignored",
        "<image> stood inside the question; the picture stands before it",
        "an animation or several pages, of which the first is read",
    ]
    assert not list(notes(talk(*HI), of_turns("1", None, ())))
