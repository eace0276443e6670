"""Plain texts and captions: rows of one text, alone or with a picture."""

from __future__ import annotations

import pytest

from gemoe_ds.data.sources.formats import RowFormat
from gemoe_ds.data.sources.formats.base import Columns
from gemoe_ds.data.sources.unusable import Unusable
from gemoe_ds.data.turn import Message

TURNS = RowFormat.named("texts")
TEXT, CAPTIONS = RowFormat.named("text"), RowFormat.named("captions")
ASKS = Columns(question="Describe it.")


def test_a_text_is_one_message_as_it_is():
    draft = TEXT.read({"id": 1, "text": " Once\n", "meta": {"a": 1}}, Columns(), None)
    assert draft.messages == (Message("text", " Once\n", loss=True),)
    assert draft.notes == ("the key 'meta' is ignored",)
    assert TEXT.read({"body": "x"}, Columns(text="body"), None).messages[0].content == "x"
    assert not TEXT.accepts({"text": "x", "image": b"x"}, Columns())


@pytest.mark.parametrize("key", ["txt", "caption", "text"])
def test_a_caption_answers_the_given_question(key):
    row = {"images": [b"x"], key: " A cat. "}
    assert CAPTIONS.accepts(row, Columns()) and not TEXT.accepts(row, Columns())
    draft = CAPTIONS.read(row, ASKS, None)
    assert [m.content for m in draft.messages] == ["<image>\nDescribe it.", " A cat. "]
    assert draft.pictures == (b"x",)


@pytest.mark.parametrize(
    "form, row, columns, group",
    [
        (TURNS, {"texts": [{"user": "a"}]}, Columns(), "no texts"),
        (TURNS, {"texts": [{"user": "a", "assistant": None}]}, Columns(), "no text"),
        (TURNS, {"texts": [{"user": "a", "assistant": "b", "audio": "c"}]}, Columns(), "audio"),
        (TEXT, {"text": "\n"}, Columns(), "no text"),
        (TEXT, {"text": 3}, Columns(), "no text"),
        (TEXT, {"text": "an <image> tag"}, Columns(), "marker without a picture"),
        (TEXT, {"text": "a", "image": "a.png"}, Columns(), "picture without a marker"),
        (TEXT, {"text": "a", "image_path": "a.png"}, Columns(), "picture elsewhere"),
        (TEXT, {"text": "a", "audio": "a.wav"}, Columns(), "audio"),
        (CAPTIONS, {"image": b"x", "txt": "a"}, Columns(), "captions without a question"),
        (CAPTIONS, {"images": [b"x", b"y"], "txt": "a"}, ASKS, "not a caption"),
        (CAPTIONS, {"image": b"x"}, ASKS, "not a caption"),
        (CAPTIONS, {"image_path": "a.png", "caption": "a"}, ASKS, "picture elsewhere"),
        (CAPTIONS, {"image": b"x", "txt": " "}, ASKS, "empty answer"),
    ],
)
def test_what_would_be_lost_is_named(form, row, columns, group):
    with pytest.raises(Unusable) as why:
        form.read(row, columns, None)
    assert why.value.group == group


def test_turns_of_user_and_assistant():
    turns = [{"user": "What?", "assistant": "A cat.", "source": "vqa"}]
    turns.append({"user": "And?", "assistant": "A dog.", "loss": False})
    row = {"images": [b"x", b"y"], "texts": turns, "source": "a"}
    draft = TURNS.read(row, Columns(), None)
    assert [(m.content, m.loss) for m in draft.messages] == [
        ("<image><image>\nWhat?", False),
        ("A cat.", True),
        ("And?", False),
        ("A dog.", False),
    ]
    assert draft.pictures == (b"x", b"y")
    assert draft.notes == ("the key 'source' is ignored", "the key 'source' of a turn is ignored")
    marked = {"images": [b"x"], "texts": [{"user": "See <image>?", "assistant": "Yes"}]}
    assert TURNS.read(marked, Columns(), None).messages[0].content == "See <image>?"


def test_every_format_has_its_own_rows():
    """Of a row that several could read, one does, by its rank."""
    rows = {
        "conversations": {"conversations": [], "text": "x"},
        "messages": {"messages": [], "text": "x", "prompt": "x"},
        "alpaca": {"instruction": "a", "output": "b", "text": "Below is an instruction ..."},
        "conversation": {"conversation": [], "text": "x", "prompt": "x"},
        "text": {"text": "x"},
        "texts": {"texts": [{"user": "a", "assistant": "b"}], "image": b"x", "caption": "x"},
        "captions": {"image": b"x", "text": "x"},
    }
    assert sorted(rows) == RowFormat.names()
    for name, row in rows.items():
        able = [known for known in RowFormat.known() if known.accepts(row, Columns())]
        assert max(able, key=lambda known: known.rank).name == name
