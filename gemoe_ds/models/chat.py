"""The text around questions and answers, in the words that a model was trained with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

IMAGE, TEXT, END = "{image}", "{text}", "{end}"
_MARKS = r"(\{image\}|\{end\}|\{bos\}|\{eos\}%s)"


@dataclass(frozen=True)
class ChatTemplate:
    """A conversation is `start`, then for each turn `question` and `answer`.

    The first question of a sample with an image is `question_with_image`. {text} is the question or
    the answer, tokenised as ordinary text even where it contains special tokens; {image}, {bos} and
    {eos} are those tokens. The loss counts answers; {end} separates the words that evaluation
    compares from the tokens that only end the answer.
    """

    question: str = " USER: {text} ASSISTANT:"
    question_with_image: str = "{image} USER: {text} ASSISTANT:"
    answer: str = " {text}{end}{eos}"
    start: str = "{bos}"
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
    # what the model's own code adds to a tokenizer without it, in this order, and the ids it gets
    added: Mapping[str, int] = field(default_factory=dict)

    def asked(self, text: str, has_image: bool) -> tuple[str, str]:
        """The template of a question, and its text."""
        if self.stripped:  # behind an image a text has its left end inside the message
            text = text.rstrip() if has_image else text.strip()
        if has_image:
            usual, empty = self.question_with_image, self.only_image
        else:
            usual, empty = self.question, self.no_question
        return (usual if text or empty is None else empty), text

    def answered(self, text: str) -> tuple[str, str]:
        """The template of an answer, and its text."""
        return self.answer, text.strip() if self.stripped else text

    def pieces(self, template: str) -> list[str]:
        """The marks, special tokens and stretches of text that a template consists of."""
        return [piece for piece in self._marks.split(template) if piece]

    def names(self, mark: str) -> bool:
        """Whether a template has the mark {bos} or {eos}."""
        templates = (self.question, self.question_with_image, self.answer, self.start)
        return any(f"{{{mark}}}" in template for template in templates)

    def is_mark(self, piece: str) -> bool:
        return self._marks.fullmatch(piece) is not None

    @cached_property
    def _marks(self) -> re.Pattern[str]:
        return re.compile(_MARKS % "".join(f"|{re.escape(token)}" for token in self.specials))
