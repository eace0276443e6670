"""A sample in memory: a conversation with any number of pictures in it, or a plain text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

Role = Literal["system", "user", "assistant", "text"]
LEARNED = ("assistant", "text")  # roles that may count for the loss
MARK = "<image>"  # stands in a message where a picture does
_LEADING = re.compile(rf"(?:{MARK}\n?)*")


@dataclass(frozen=True)
class Picture:
    """Encoded bytes, as they were found, and the size as shown: turned upright by EXIF.

    0 x 0: not known, as in folders of schema 1; `images.shown_size` reads the header then.
    """

    data: bytes
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class Message:
    """What one side says, or a whole plain text.

    `content` has MARK where a picture stands. `loss`: whether it is learned, which by default what
    the assistant says and a plain text are. `kind`, of an answer, groups questions in evaluation.
    """

    role: Role
    content: str
    loss: bool = cast(bool, None)
    kind: str | None = None

    def __post_init__(self) -> None:
        if self.loss is None:
            object.__setattr__(self, "loss", self.role in LEARNED)


@dataclass(frozen=True)
class Sample:
    """Messages, and the pictures that their marks stand for, in order; `fault` says the rules."""

    id: str
    messages: tuple[Message, ...]
    images: tuple[Picture, ...] = ()
    source: str = ""

    @property
    def answers(self) -> tuple[Message, ...]:
        """What of the assistant's is learned, and asked for in evaluation."""
        return tuple(m for m in self.messages if m.role == "assistant" and m.loss)

    @property
    def questions(self) -> tuple[str, ...]:
        """What each of the answers is to, without the pictures that stand before it."""
        pairs = zip(self.messages, self.messages[1:], strict=False)
        asked = (before.content for before, m in pairs if m.role == "assistant" and m.loss)
        return tuple(leading_marks(content)[1] for content in asked)


def leading_marks(content: str) -> tuple[int, str]:
    """How many pictures stand before a text, and the text.

    Of pictures that all stand before it a model's own template says what parts them from the text,
    so that a line end behind their marks is none of it.
    """
    found = _LEADING.match(content)
    assert found is not None
    return found[0].count(MARK), content[found.end() :]


class Turn(NamedTuple):
    """A question and its answer: all that most sources have."""

    human: str
    gpt: str
    kind: str | None = None


def of_turns(id: str, image: bytes | Picture | None, turns: Iterable[Turn]) -> Sample:
    """A conversation about a picture, which stands before its first question, or about none."""
    messages: list[Message] = []
    for turn in turns:
        asked = f"{MARK}\n{turn.human}" if image is not None and not messages else turn.human
        messages += [Message("user", asked), Message("assistant", turn.gpt, kind=turn.kind)]
    if isinstance(image, bytes):
        image = Picture(image)
    return Sample(id, tuple(messages), () if image is None else (image,))


def fault(sample: Sample) -> str | None:
    """The rule that a sample breaks; None if it is whole.

    Either one `text` message without pictures, or messages of user and assistant in turn, which end
    with the assistant's and may begin with one of the system. One of them at least is learned.
    Pictures stand in messages of the user, as many as there are marks.
    """
    messages = sample.messages
    roles = [message.role for message in messages]
    talk = roles[1:] if roles[:1] == ["system"] else roles
    if roles != ["text"] and (not talk or talk != ["user", "assistant"] * (len(talk) // 2)):
        said = ", ".join(roles) or "nobody"
        return (
            "its messages are neither one text nor, after a system message or none, of user and "
            f"assistant in turn: they are from {said[:80]}"
        )
    for place, message in enumerate(messages):
        if message.role != "user" and (marks := message.content.count(MARK)):
            of = "a plain text" if message.role == "text" else f"message {place} ({message.role})"
            return f"{of} holds {MARK} ({marks}), and only questions show pictures"
        if message.loss and message.role not in LEARNED:
            return f"message {place} ({message.role}) is to be learned; only answers and texts are"
    marks = sum(message.content.count(MARK) for message in messages)
    if marks != len(sample.images):
        return f"it has {len(sample.images)} pictures, and {marks} {MARK} that say where"
    if not any(message.loss for message in messages):
        return "no message of it is learned"
    return None
