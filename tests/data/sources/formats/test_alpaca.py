"""Alpaca rows and ms-swift's: system, history and input have their places."""

from __future__ import annotations

import pytest

from gemoe_ds.data.sources.formats import RowFormat
from gemoe_ds.data.sources.formats.base import Columns, Draft
from gemoe_ds.data.sources.unusable import Unusable

ALPACA = RowFormat.named("alpaca")


def read(**row) -> Draft:
    assert ALPACA.accepts(row, Columns())
    return ALPACA.read(row, Columns(), None)


def said(draft: Draft) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in draft.messages]


def test_rows_as_they_are_published():
    draft = read(instruction=" Add:", input="    1\n", output="3\n", id=7, lang="en")
    assert said(draft) == [("user", " Add:\n    1\n"), ("assistant", "3\n")]
    assert draft.notes == ("the key 'lang' is ignored",)
    assert said(read(instruction="Go", input=" ", output="3")) == [
        ("user", "Go"),
        ("assistant", "3"),
    ]
    draft = read(query="q", response="a", system="s", history=[["q0", "a0"]])
    assert said(draft) == [
        ("system", "s"),
        ("user", "q0"),
        ("assistant", "a0"),
        ("user", "q"),
        ("assistant", "a"),
    ]
    draft = read(instruction="<image>What?", output="a", images=["a.png"], history=[], system=None)
    assert (draft.pictures, draft.messages[0].content) == (("a.png",), "<image>What?")


@pytest.mark.parametrize(
    "row, expected",
    [
        (dict(instruction="q", context="c", response="a", category="x"), ["q\nc", "a"]),
        (dict(prompt="q", completion="a"), ["q", "a"]),
        (dict(system_prompt="s", question="q", response="a"), ["s", "q", "a"]),
        (dict(system_prompt="", question="q", answer="a", text="q a"), ["q", "a"]),
        (dict(prompt="q", response="a", text="q a"), ["q", "a"]),
        (dict(question="q", answer="a", image=b"x"), ["<image>\nq", "a"]),
        (dict(question="See <image>?", answer="a", image=b"x"), ["See <image>?", "a"]),
    ],
)
def test_other_names_of_question_and_answer(row, expected):
    assert [content for _, content in said(read(**row))] == expected


def test_beside_a_conversation_they_are_its_keys():
    row = {"prompt": "q", "response": "a", "messages": [{}]}
    assert not ALPACA.accepts(row, Columns())
    assert ALPACA.accepts({"prompt": "q", "response": "a", "messages": None}, Columns())


@pytest.mark.parametrize(
    "row, group",
    [
        ({"output": " "}, "empty answer"),
        ({"output": None}, "no text"),
        ({"output": {"a": "b"}}, "no text"),
        ({"input": {"a": 1}}, "no text"),
        ({"history": ["q", "a"]}, "earlier turns"),
        ({"history": [["q", None]]}, "no text"),
        ({"video": "a.mp4"}, "video"),
        ({"tools": "[{}]"}, "tools"),
        ({"rejected": "b"}, "a preference"),
        ({"images": ["a"]}, "picture without a marker"),
        ({"weight": 0}, "weights of the loss"),
        ({"messages": [{}]}, "a second conversation"),
        ({"output": [{"role": "assistant"}]}, "messages under two keys"),
        ({"input": "a", "context": "b"}, "more of a question"),
        ({"options": ["a", "b"]}, "more of a question"),
        ({"system": "a", "system_prompt": "b"}, "a second system prompt"),
    ],
)
def test_what_would_be_lost_is_named(row, group):
    with pytest.raises(Unusable) as why:
        read(**({"instruction": "q", "output": "a"} | row))
    assert why.value.group == group
