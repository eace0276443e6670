"""Conversations of all their makers; what would be lost is dropped by name, never changed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gemoe_ds.data.sources.formats import RowFormat
from gemoe_ds.data.sources.formats.base import Columns, Draft
from gemoe_ds.data.sources.unusable import Unusable
from gemoe_ds.data.turn import Message, Turn, of_turns

NAN = float("nan")


def talk(*messages: tuple, **more) -> dict:
    """A row of (speaker, value[, further keys]) messages."""
    conversations = [{"from": m[0], "value": m[1], **(m[2] if m[2:] else {})} for m in messages]
    return {"id": "1", "conversations": conversations, **more}


def human(text, **more) -> tuple:
    return ("human", text, more)


def gpt(text, **more) -> tuple:
    return ("gpt", text, more)


def read(row: Any, kinds: Any = None, form: str = "conversations") -> Draft:
    return RowFormat.named(form).read(row, Columns(), kinds)


def turns(*pairs: Turn, image: bytes | None = None) -> tuple[Message, ...]:
    return of_turns("1", image, pairs).messages


HI = (("human", "Hi"), ("gpt", "Hello"))
SEE = (("human", "<image>\nWhat?"), ("gpt", "A cat."))
TURN = turns(Turn("Hi", "Hello"))


@pytest.mark.parametrize(
    "row",
    [
        talk(*HI, source="coco", model="g", width=640, bbox=[0, 0, 1, 1], score=0.3),
        talk(*HI, video=None, images=[], system="", tools=[], audio={}, weight=None),
        talk(*HI, weight=1, loss=True, train=1.0),
        talk(("human", "Hi", {"weight": 0}), ("gpt", "Hello", {"weight": 1, "loss": True})),
        talk(("human", "Hi", {"weight": 1, "train": False}), ("gpt", "Hello", {"train": True})),
        talk(*HI, image=NAN, images=NAN, tools="[]", functions="{}", weight=NAN),
        talk(*HI, image=None, image_path=None, label=3),
        talk(*HI, image_id=7, video_id="v", num_frames=9, masked=False),
    ],
)
def test_what_loses_nothing_is_used(row):
    assert read(row).messages == TURN


def test_texts_stay_what_they_are():
    for text in (
        "use <video> and <img> tags",
        "</s> <|image_pad|>",
        "a\0b",
        "\ufeffx",
        "你好 🐈",
        "    return x\n",
    ):
        row = talk(("human", "Hi"), ("gpt", text))
        assert read(row).messages == turns(Turn("Hi", text))
    assert read(talk(("human", 'A <img src="a"> tag?'), ("gpt", "No")))
    draft = read(talk(("system", "\n s "), ("human", "  f(x)\n"), ("gpt", "\r\n\ty ")))
    assert [m.content for m in draft.messages] == ["\n s ", "  f(x)\n", "\r\n\ty "]
    draft = read(talk(*SEE, image="a.png", image_url="http://x"))
    assert draft.messages == turns(Turn("What?", "A cat."), image=b"x")
    assert draft.pictures == ("a.png",)


LOSS = "weights of the loss"
PICTURES = "a second list of pictures"
SYSTEM = "a second system prompt"
BARE = "marker without a picture"
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
        (talk(*HI, sample_weight=0), LOSS, "it has 'sample_weight': 0; every row counts once"),
        (talk(("human", "Hi"), ("gpt", "Ho", {"compute_loss": False})), LOSS, "none of its"),
        (talk(("human", "Hi"), ("gpt", "Ho", {"is_masked": True})), LOSS, "none of its"),
        (talk(("system", "s"), *HI, System="Be brief."), SYSTEM, "'System' and a system message"),
        (talk(*HI, System="Be brief.", system="s"), SYSTEM, "it has 'system', and a second system"),
        (talk(*HI, tools="[{}]"), "tools", "'tools'"),
        (talk(*HI, functions=[{"name": "f"}]), "tools", "'functions'"),
        (talk(*SEE, image="a.png", images=["b.png"]), PICTURES, "under image and images"),
        (talk(*SEE, image="a.png", image_list=["b.png"]), PICTURES, "'image_list'"),
        (talk(*HI, rejected={"from": "gpt", "value": "No"}), "a preference", "'rejected'"),
        (talk(*HI, chosen_response="x"), "a preference", "'chosen_response'"),
        (talk(*HI, kto_tag=False), "a preference", "'kto_tag'"),
        (talk(*HI, label=False), "a preference", "'label'"),
        (talk(*HI, history=[["a", "b"]]), "earlier turns", "'history'"),
        (talk(*HI, messages=[{}]), "a second conversation", "'messages'"),
        (talk(*HI, image_path="a.png"), "picture elsewhere", "'image_path', not under 'image'"),
        (talk(*HI, Image="a.png"), "picture elsewhere", "under 'Image'"),
        (talk(*HI, weight=0), LOSS, "'weight': 0; every row counts once"),
        (talk(*HI, weight=2), LOSS, "'weight': 2"),
        (talk(HI[0], gpt("x", weight=0)), LOSS, "none of its answers is to be learned"),
        (talk(HI[0], gpt("x", weight=0.5)), LOSS, "0.5"),
        (talk(HI[0], gpt("x", weight=NAN)), LOSS, "nan"),
        (talk(*HI, HI[0], gpt("x", weight=0.5)), LOSS, "message 3 has 'weight': 0.5; an answer"),
        (talk(HI[0], gpt("x", train="false")), LOSS, "'train': 'false'"),
        (talk(human("x", train=True), HI[1]), LOSS, "no question is learned"),
        (talk(HI[0], gpt("x", train_detail=[1])), "a mask of the loss", "'train_detail'"),
        (talk(HI[0], gpt("x", reasoning_content="y")), "reasoning", "message 1 has 'reasoning_"),
        (talk(human("x", image="b.png"), HI[1]), "a picture of its own", "message 0 has 'image'"),
        (talk(HI[0], gpt("x", content="y")), "a second text", "'content'"),
        (talk(HI[0], gpt("x", tool_calls=[{}])), "tools", "'tool_calls'"),
        (talk(*HI, ("system", "s"), *HI), "a later system prompt", "message 2 is from the system"),
        (talk(*HI, ("System", "s"), gpt("x")), "a later system prompt", "message 2 is from"),
        (talk(HI[0], ("function_call", "{}"), ("observation", "x"), HI[1]), "tools", "'funct"),
        (talk(gpt("Hello!"), *HI), "gpt speaks first", "remove what gpt says before"),
        (talk(("system", "s"), HI[1], HI[0]), "gpt speaks first", "message 1 is from"),
        (talk(*HI, HI[0]), "not pairs", "from human, gpt, human"),
        (talk(HI[0], *HI, HI[1]), "not pairs", "from human, human, gpt, gpt"),
        (talk(), "not pairs", "from nobody"),
        (talk(("alice", "Hi"), ("gpt", "x")), "other speakers", "called system, human (or user)"),
        (talk(("Human ", "Hi"), ("GPT", "x")), "other speakers", "'Human '"),
        (talk((None, "Hi"), HI[1]), "other speakers", "message 0 is from nobody"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages", "OpenAI's roles"),
        ({"conversations": [{"role": "user", "content": "x"}]}, "not pairs", "it is from user"),
        ({"instruction": "a", "output": "b"}, "alpaca", "(alpaca: "),
        ({"asked": "a", "said": "b"}, "no conversations", "its keys: asked, said"),
        ({}, "no conversations", "its keys: none"),
        ({"conversations": "[]"}, "not pairs", "from nobody"),
        ({"conversations": "Hi"}, "not conversations", "conversations is 'Hi', not a list"),
        ({"conversations": {"from": ["human"], "value": []}}, "not conversations", "not a list"),
        ({"conversations": {"from": "human"}}, "not conversations", "not a list"),
        ({"conversations": [["q", "a"]]}, "not conversations", "message 0 is ['q', 'a'], not"),
        (talk(HI[0], gpt(None)), "no text", "message 1 has no text"),
        (talk(HI[0], gpt(3)), "no text", "message 1 is 3, not a text"),
        (talk(HI[0], gpt(NAN)), "no text", "message 1 is nan, not a text"),
        (talk(("human", [{"type": "text"}]), HI[1]), "parts", "a text part without a text"),
        (talk(HI[0], gpt(" \n")), "empty answer", "an answer is empty"),
        (talk(*HI, image="a.png"), "picture without a marker", "1 pictures, and 0 times <image>"),
        (talk(*SEE), "marker without a picture", "it has 0 pictures, and 1 times <image>"),
        (talk(*SEE, images=["a", "b"]), "pictures without markers", "2 pictures, and 1 times"),
        (talk(human("<image><image>"), HI[1], image="a"), BARE, "in messages 0, 0"),
        (talk(HI[0], gpt("<image>"), image="a"), "marker in an answer", "message 1, from the"),
        (talk(("system", "<image>"), *HI, image="a"), "picture elsewhere", "from the system"),
        (talk(human("See <bbox>"), HI[1]), MARKERS, "<bbox>"),
        (talk(human("<video>\nWhat?"), HI[1]), MARKERS, "holds the marker <video>"),
        (talk(human("< Audio >"), HI[1]), MARKERS, "holds the marker < Audio >"),
        (talk(human("<Image>"), HI[1]), MARKERS, "<Image>"),
        (talk(*HI, human("<|vision_start|><|image_pad|>"), HI[1]), MARKERS, "message 2"),
        (talk(human("<im_start><image><im_end>"), HI[1], image="a"), MARKERS, "<im_start>"),
        (talk(human("<image_1> <image-2>"), HI[1]), MARKERS, "<image_1>"),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_named(row, group, words):
    with pytest.raises(Unusable) as why:
        read(row)
    assert words in str(why.value) and why.value.group == group
    assert len(str(why.value)) < 300


def test_speakers_of_all_formats_and_systems_first():
    expected = (Message("system", "s"), *TURN)
    for asked, answered in (("human", "gpt"), ("user", "assistant"), ("user", "chatgpt")):
        assert read(talk(("system", "s"), (asked, "Hi"), (answered, "Hello"))).messages == expected
    for key in ("system", "systemPrompt", "system_prompt"):
        assert read(talk(*HI, **{key: "s"})).messages == expected
    for system, asked, answered in (("developer", "User", "Assistant"), ("SYSTEM", "Human", "GPT")):
        said = talk((system, "s"), (asked, "Hi"), (answered, "Hello"))
        assert read(said).messages == expected
    assert read(talk(("system", " "), *HI)).messages == TURN
    openai = [{"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Hello"))]
    assert read({"messages": openai, "system": "s"}, form="messages").messages == expected
    assert read({"conversations": openai}).messages == TURN


def test_lists_of_messages_as_tables_keep_them():
    said = {"from": ["human", "gpt"], "value": ["Hi", "Hello"]}
    assert read({"conversations": said}).messages == TURN
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert read({"messages": json.dumps(messages)}, form="messages").messages == TURN
    row = {"conversation": [message | {"turn": 1} for message in messages], "model": "x"}
    assert RowFormat.named("conversation").accepts(row, Columns())
    assert read(row, form="conversation").messages == TURN


@pytest.mark.parametrize("key, value", [("weight", 0), ("loss", False), ("is_masked", True)])
def test_answers_that_are_not_learned(key, value):
    row = talk(HI[0], gpt("Hm", **{key: value}), HI[0], HI[1])
    assert [m.loss for m in read(row).messages] == [False, False, False, True]


def test_pictures_stand_where_their_markers_do():
    """LLaVA's one picture, named as text, goes before the question it begins or ends."""

    def first(text: str, **more: Any) -> tuple[str, tuple[Any, ...]]:
        draft = read(talk(human(text), HI[1], **more))
        return draft.messages[0].content, draft.pictures

    assert first("<image>\nWhat?", image="a") == ("<image>\nWhat?", ("a",))
    assert first("What?\n<image>", image="a") == ("<image>\nWhat?", ("a",))
    assert first(" What?\n<image>\n", image="a") == ("<image>\nWhat?", ("a",))
    assert first("\n<image> f(x)\n", images=["a"]) == ("<image> f(x)\n", ("a",))
    assert first("\nSee <image> here\n", image="a") == ("\nSee <image> here\n", ("a",))
    assert first("See <image> here", image="a") == ("See <image> here", ("a",))
    assert first("What?\n<image>", images=["a"]) == ("What?\n<image>", ("a",))
    two = "A <image> and B\n<image>"
    assert first(two, image=["a", "b"]) == (two, ("a", "b"))
    later = read(talk(*HI, *SEE, image="a.png"))
    assert [m.content for m in later.messages] == ["Hi", "Hello", "<image>\nWhat?", "A cat."]


def test_kinds_stand_with_the_answers():
    row = talk(("system", "s"), *HI, *HI)
    assert [m.kind for m in read(row, ["a", "b"]).messages] == [None, None, "a", None, "b"]
    with pytest.raises(Unusable, match="1 kinds for 2 questions"):
        read(row, ["a"])


def part(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, **more}


def asked_in(*parts: Any, **row: Any) -> Draft:
    messages = [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "Yes."}]
    return read({"messages": messages, **row}, form="messages")


@pytest.mark.parametrize(
    "picture, found",
    [
        (part("image_url", image_url={"url": "data:x", "detail": "low"}), "data:x"),
        (part("image_url", image_url="a.png"), "a.png"),
        (part("input_image", image_url="a.png"), "a.png"),
        (part("image", image="a.png", text=None), "a.png"),
        (part("image", path="a.png"), "a.png"),
        (part("image", bytes=b"a"), b"a"),
        (part("image", image={"bytes": b"a", "path": None}), {"bytes": b"a", "path": None}),
        (part("image", source={"type": "base64", "media_type": "x", "data": "AA"}), "AA"),
    ],
)
def test_parts_with_a_picture_of_their_own(picture, found):
    draft = asked_in(part("text", text="What is "), picture, "?")
    assert draft.messages[0].content == "What is <image>?" and draft.pictures == (found,)


def test_parts_that_stand_for_pictures_of_the_row():
    see = part("text", text="same?")
    draft = asked_in(part("image"), part("image", index=None), see, images=["a", "b"])
    assert (draft.messages[0].content, draft.pictures) == ("<image><image>same?", ("a", "b"))
    draft = asked_in(part("image", index=1), part("image", index=0), see, images=["a", "b"])
    assert draft.pictures == ("b", "a")
    text_only = asked_in(part("text", text="<image>same?"), images=["a"])
    assert text_only.pictures == ("a",)


@pytest.mark.parametrize(
    "parts, row, group, words",
    [
        ([part("image")], {}, BARE, "the row has none (left) for it"),
        ([part("image", index=2)], {"images": ["a"]}, BARE, "none (left)"),
        ([part("image")], {"images": ["a", "b"]}, "picture without a marker", "1 of its 2"),
        ([part("image", path="a"), "<image>"], {}, "parts", "in its text as well"),
        ([part("image", path="a", url="b")], {}, "parts", "two pictures"),
        ([part("video", video="a.mp4")], {}, "video", "of type 'video'"),
        ([part("input_audio", input_audio={})], {}, "audio", "text and image can be used"),
        ([part("file", file={})], {}, "parts", "of type 'file'"),
        ([3], {}, "parts", "the part 3, which is no object"),
        ([part("image", image="a", text="What?")], {}, "parts", "of type 'image' with 'text'"),
        ([part("text", text="What?", image="a")], {}, "parts", "of type 'text' with 'image'"),
        ([part("text", text="What?", url="a.png")], {}, "parts", "as two parts"),
        ([part("text", text="x", video="a.mp4")], {}, "video", "has 'video'"),
    ],
)
def test_parts_that_cannot_be_used(parts, row, group, words):
    with pytest.raises(Unusable) as why:
        asked_in("Hi", *parts, **row)
    assert words in str(why.value) and why.value.group == group


def test_notes_say_what_is_not_read():
    asked = ("human", "See <image> here", {"id": 3, "weight": 1})
    row = talk(asked, ("gpt", "x", {"id": 4}), image="a.gif", source="coco", model="", weight=1)
    assert list(read(row).notes) == [
        "the key 'source' is ignored",
        "the key 'id' of a message is ignored",
    ]
    assert not read(talk(*HI)).notes
    assert not asked_in(part("text", text="x", image=None, source="wiki", url="x.org")).pictures
    cached = asked_in(part("text", text="x", cache_control={"type": "ephemeral"}))
    assert list(cached.notes) == ["the key 'cache_control' of a part is ignored"]
