"""Samples of every shape: pictures in any question, system messages, answers that are not learned,
plain texts."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from functools import cache

from PIL import Image

from gemoe_ds.data.turn import MARK, Message, Picture, Sample

WORDS = ("a", "b", "c", "d e", "f. g", "h")
SIZES = [(40, 30), (70, 160), (1, 1), (500, 90), (33, 34)]


@cache
def encoded_picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (width % 256, height % 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class Asked:
    """A question: pictures before it, its text, and more text behind each picture inside it."""

    before: int
    text: str
    inside: tuple[str, ...]

    @property
    def content(self) -> str:
        end = "" if self.inside else "\n"
        return (MARK + end) * self.before + MARK.join([self.text, *self.inside])


def asked_of(rng: random.Random, most: int) -> Asked:
    """At most so many pictures."""
    before = min(rng.choice([0, 0, 1, 2]), most)
    inside = min(rng.choice([0, 0, 0, 1, 2]), most - before)

    def said(place: int, of: int) -> str:
        words = " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
        return words if place == 0 else f" {words}" if rng.random() < 0.7 or place < of else ""

    return Asked(before, said(0, inside), tuple(said(n, inside) for n in range(1, inside + 1)))


def ragged(
    rng: random.Random,
    name: str,
    *,
    pictures: int = 4,
    system: bool = True,
    texts: bool = True,
    sizes_known: bool = True,
) -> tuple[Sample, list[Asked]]:
    """A sample of up to so many `pictures`, and its questions."""

    def words() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))

    if texts and rng.random() < 0.2:
        return Sample(name, (Message("text", words()),)), []
    messages = [Message("system", words())] if system and rng.random() < 0.4 else []
    asked: list[Asked] = []
    num_turns = rng.randint(1, 4)
    learned = [rng.random() < 0.7 for _ in range(num_turns)]
    learned[rng.randrange(num_turns)] = True
    for is_learned in learned:
        asked.append(asked_of(rng, pictures))
        pictures -= asked[-1].content.count(MARK)
        messages.append(Message("user", asked[-1].content))
        messages.append(Message("assistant", words(), loss=is_learned))
    number = sum(one.content.count(MARK) for one in asked)
    sizes = rng.choices(SIZES, k=number)
    images = [Picture(encoded_picture(*size), *(size if sizes_known else (0, 0))) for size in sizes]
    return Sample(name, tuple(messages), tuple(images)), asked
