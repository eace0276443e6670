"""The text around questions and answers, in the words that a model was trained with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

IMAGE, TEXT, END = "{image}", "{text}", "{end}"
_MARKS = r"(\{image\}|\{end\}|\{bos\}|\{eos\}%s)"


@dataclass(frozen=True)
class ChatTemplate:
    """A conversation is `start`, then for each turn `question`, `answer` and `after_answer`.

    The first question of a sample with an image is `question_with_image`. {text} is the question or
    the answer, spelled, never obeyed; {image}, {bos} and {eos} say themselves. The loss counts on
    answers; {end} stands between the words that are graded and what only ends them.
    """

    question: str = " USER: {text} ASSISTANT:"
    question_with_image: str = "{image} USER: {text} ASSISTANT:"
    answer: str = " {text}{end}{eos}"
    after_answer: str = ""  # not a target
    start: str = "{bos}"
    specials: tuple[str, ...] = ()  # special tokens that the templates name

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
