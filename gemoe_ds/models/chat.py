"""The text around questions and answers, in the words that a model was trained with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

IMAGE, TEXT, END = "{image}", "{text}", "{end}"
_MARKS = r"(\{image\}|\{end\}|\{bos\}|\{eos\}%s)"


@dataclass(frozen=True)
class ChatTemplate:
    """A conversation is `start`, then for each turn `question` and `answer`.

    The first question of a sample with an image is `question_with_image`; what a system message
    says stands in the place of `start`, as `system` has it. {text} is the question or the answer,
    tokenised as ordinary text even where it contains special tokens; {image}, {bos} and {eos} are
    those tokens. The loss counts answers; {end} separates the words that evaluation
    compares from the tokens that only end the answer. A text that is no conversation is `document`,
    as the model was pretrained on.
    """

    question: str = " USER: {text} ASSISTANT:"
    question_with_image: str = "{image} USER: {text} ASSISTANT:"
    answer: str = " {text}{end}{eos}"
    start: str = "{bos}"
    document: str = "{bos}{text}{end}{eos}"
    no_question: str | None = None  # for a question without a text, if it is another template
    only_image: str | None = None  # and for one with an image
    specials: tuple[str, ...] = ()  # special tokens that the templates name
    obeyed: tuple[str, ...] = ()  # special tokens that stay special inside a text
    stops: tuple[
        str, ...
    ] = ()  # at which the model's own generation ends, besides the answer's end
    stripped: bool = False  # a message loses the space at both its ends
    joined: bool = False  # text between special tokens is tokenised at once, not by template
    eos_as_bos: bool = False  # of a tokenizer that has no bos
    pad: str | None = None  # of a tokenizer that has none
    system: str | None = None  # None: it knows no system message
    between_images: str = ""  # where several stand before a question
    one_image: bool = False  # one at a time, before everything
    # Of prompts alone. Not in the repr, by which token lengths on disk know a template.
    bos_before_text: bool = field(default=False, repr=False)  # its class added it to text
    # what the model's own code adds to a tokenizer without it, in this order, and the ids it gets
    added: Mapping[str, int] = field(default_factory=dict)

    def begun(self, system: str | None) -> tuple[str, str]:
        """The template of what stands before the first question, and its text."""
        if system is None:
            return self.start, ""
        assert self.system is not None
        return self.system, system.strip() if self.stripped else system

    def asked(self, text: str, num_images: int = 0) -> tuple[str, str]:
        """The template of a question behind so many images, and its text."""
        if self.stripped:  # behind an image a text has its left end inside the message
            text = text.rstrip() if num_images else text.strip()
        if num_images:
            usual, empty = self.question_with_image, self.only_image
        else:
            usual, empty = self.question, self.no_question
        images = self.between_images.join([IMAGE] * num_images)
        return (usual if text or empty is None else empty).replace(IMAGE, images), text

    def asked_around(self, parts: Sequence[str]) -> tuple[str, tuple[str, ...]]:
        """The same of a question that has its images inside: between its parts."""
        first, *middle, last = parts
        if self.stripped:
            first, last = first.lstrip(), last.rstrip()
        return self.question, (first, *middle, last)

    def answered(self, text: str) -> tuple[str, str]:
        """The template of an answer, and its text."""
        return self.answer, text.strip() if self.stripped else text

    def pieces(self, template: str) -> list[str]:
        """The marks, special tokens and stretches of text that a template consists of."""
        return [piece for piece in self._marks.split(template) if piece]

    def names(self, mark: str) -> bool:
        """Whether a template has the mark {bos} or {eos}."""
        return any(f"{{{mark}}}" in template for template in self._templates)

    @property
    def named(self) -> list[str]:
        """The special tokens that stand in a template, not around images alone."""
        return [t for t in self.specials if any(t in template for template in self._templates)]

    @cached_property
    def answer_begins(self) -> re.Pattern[str]:
        """Behind what every question ends with."""
        tails = {t.rpartition(TEXT)[2] for t in (self.question, self.question_with_image)}
        return re.compile("|".join(f"(?<={re.escape(tail)})" for tail in sorted(tails) if tail))

    def is_mark(self, piece: str) -> bool:
        return self._marks.fullmatch(piece) is not None

    @property
    def _templates(self) -> tuple[str, ...]:
        return self.question, self.question_with_image, self.answer, self.start

    @cached_property
    def _marks(self) -> re.Pattern[str]:
        tokens = (*self.specials, *self.stops)
        return re.compile(_MARKS % "".join(f"|{re.escape(token)}" for token in tokens))
