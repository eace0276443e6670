"""Prompts of benchmarks: text and any number of pictures as the model's own code joins them.

A picture goes to the place where the text marks it, else before the text. A prompt that is too long
loses the beginning of its text.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from gemoe_ds.data.collate import Collator, Encoded
from gemoe_ds.data.conversation import Filled
from gemoe_ds.data.images import as_shown
from gemoe_ds.errors import ConfigError, ImageError, SampleError
from gemoe_ds.models.images import ProcessedImage

_NUMBERED, _MARK = re.compile(r"<image (\d+)>"), "<image>"


@dataclass(frozen=True)
class Question:
    """What a user says.

    `lead` stands before the text and is never cut, as a style prefix of Molmo's. `in_place`: the
    marks in the text say where pictures go; otherwise they stand before it, and marks are text. A
    text in parts has its pictures between them.
    """

    text: str | tuple[str, ...]
    lead: str = ""
    system: str | None = None
    answer_so_far: str = ""
    in_place: bool = True


class PromptEncoder:
    """Encodes prompts for `Collator.batch(..., left=True)`; `name` names them in errors."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator
        chat = collator.conversations.chat
        self.knows_system = chat.system is not None
        self._one_image = chat.one_image

    def chat(
        self,
        question: Question,
        pictures: Sequence[Image.Image] = (),
        *,
        room: int,
        row: int = 0,
        name: str = "prompt",
    ) -> Encoded:
        """A question in the model's chat template, of at most `room` tokens.

        The template, the pictures, the system message and the begun answer stay. The question loses
        characters on its left; `cut_tokens` counts the tokens that went. SampleError if that does
        not help, for a picture that cannot be read, and for more pictures than the model takes.
        """
        if question.system is not None and not self.knows_system:
            raise ConfigError("this model's chat template has no system message; leave it out")
        if self._one_image and len(pictures) > 1:
            raise SampleError(
                f"{name}: it shows {len(pictures)} pictures, and this model reads one at a time; "
                "choose a --prompt-style that says which, or leave the task out"
            )
        in_place = question.in_place and not self._one_image
        order, parts = _placed(question.text, len(pictures), in_place)
        images = self._laid([pictures[place] for place in order], name)
        image_tokens = sum(len(image.input_ids) for image in images)

        def ids_without(cut: int) -> list[list[int]]:
            asked = self._asked(question, _from(parts, cut), len(images))
            return self.collator.conversations.prompt(
                asked, system=question.system, answer=question.answer_so_far
            )

        def length(ids: list[list[int]]) -> int:
            return image_tokens + sum(map(len, ids))

        ids = ids_without(0)
        whole = length(ids)
        if whole > room:
            cuts = range(sum(map(len, parts)) + 1)
            ids = ids_without(bisect_left(cuts, True, key=lambda c: length(ids_without(c)) <= room))
            if length(ids) > room:
                raise _too_long(name, length(ids), room, len(images))
        encoded = Encoded(row, name, cut_tokens=whole - length(ids))
        encoded.add_question(ids, images)
        return encoded

    def _asked(self, question: Question, parts: Sequence[str], num_images: int) -> Filled:
        chat, (first, *others) = self.collator.conversations.chat, parts
        if others:
            return chat.asked_around([question.lead + first, *others])
        return chat.asked(question.lead + first, num_images)

    def _laid(self, pictures: Sequence[Image.Image], name: str) -> list[ProcessedImage]:
        layout, images = self.collator.layout, []
        if pictures and layout is None:
            raise SampleError(f"{name}: it shows a picture, and this backbone reads text only")
        for place, picture in enumerate(pictures, 1):
            assert layout is not None
            try:
                images.append(layout(as_shown(picture), len(pictures)))
            except ImageError as error:
                raise ImageError(f"{name}: its picture {place} cannot be read: {error}") from error
        return images


def pictures_marked(text: str) -> int:
    """How many pictures the numbered marks in a text name."""
    return len({*_NUMBERED.findall(text)})


def _too_long(name: str, length: int, room: int, num_images: int) -> SampleError:
    return SampleError(
        f"{name}: {length:,} tokens are left without the text (the template, pictures: "
        f"{num_images}), and there is room for {room:,}; leave the task out, raise "
        "data.max_length, or ask for fewer new tokens",
        needs=length,
    )


def _placed(
    text: str | tuple[str, ...], num_images: int, in_place: bool
) -> tuple[list[int], list[str]]:
    """Which pictures stand in the prompt, in order, and the text between those inside it.

    Numbered marks name the pictures that a task hands over, in the order of their numbers (MMMU:
    <image 1> and <image 3> for two of them); a picture that is named twice is shown twice, as in
    lmms-eval and VLMEvalKit. Marks that do not fit the number of pictures are text.
    """
    if not isinstance(text, str):
        return list(range(num_images)), [*text]
    first, *rest = _NUMBERED.split(text)
    numbers, between = [int(number) for number in rest[::2]], rest[1::2]
    named = sorted({*numbers})
    if in_place and num_images:
        if len(named) == num_images:
            return [named.index(number) for number in numbers], [first, *between]
        if text.count(_MARK) == num_images:
            return list(range(num_images)), text.split(_MARK)
    return list(range(num_images)), [text]


def _from(parts: Sequence[str], cut: int) -> list[str]:
    """The parts of a text without so many characters on its left."""
    kept = []
    for part in parts:
        kept.append(part[cut:])
        cut = max(0, cut - len(part))
    return kept
