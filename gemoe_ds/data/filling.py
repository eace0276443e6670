"""A sample in a model's own words: the templates of its messages, and the texts that fill them."""

from __future__ import annotations

from typing import NamedTuple

from gemoe_ds.data.turn import MARK, Sample, fault, leading_marks
from gemoe_ds.models.chat import TEXT, ChatTemplate

# A template and its text, or the parts of a text that has images between them.
Filled = tuple[str, str | tuple[str, ...]]


class Part(NamedTuple):
    """What begins a sequence, a question, or an answer."""

    filled: Filled
    is_answer: bool = False
    is_learned: bool = False


def refusal(sample: Sample, chat: ChatTemplate) -> str | None:
    """Why the messages of a sample cannot be put in this chat's words; None if they can."""
    if (broken := fault(sample)) is not None:
        return broken
    if sample.messages[0].role == "system" and chat.system is None:
        return "it has a system message, and this model's chat has none; write it into the question"
    if chat.one_image and sample.images:
        if (number := len(sample.images)) > 1:
            return f"it shows {number} pictures, and this model reads one in a conversation"
        first = next(message for message in sample.messages if message.role == "user")
        if MARK not in first.content:
            return "its picture is in a later question, and this model's stands before all text"
    return None


def parts_of(sample: Sample, chat: ChatTemplate) -> list[Part]:
    """Up to the last message that is learned: nothing is learned from what follows."""
    messages = list(sample.messages)
    while not messages[-1].loss:
        messages.pop()
    if messages[0].role == "text":
        before, _, after = chat.document.partition(TEXT)
        return [Part((before, "")), Part((TEXT + after, messages[0].content), True, True)]
    system = messages.pop(0).content if messages[0].role == "system" else None
    parts = [Part(chat.begun(system))]
    for message in messages:
        if message.role == "user":
            parts.append(Part(asked(message.content, chat)))
        else:
            parts.append(Part(chat.answered(message.content), True, message.loss))
    return parts


def asked(content: str, chat: ChatTemplate) -> Filled:
    """A question whose pictures stand before it, as the chat's template has them; or inside."""
    number, rest = leading_marks(content)
    if MARK not in rest:
        return chat.asked(rest, number)
    if chat.one_image:
        return chat.asked(content.replace(MARK, "").strip(), 1)
    return chat.asked_around(content.split(MARK))
