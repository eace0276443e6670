"""A sample in memory: a conversation, about an image or about none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """One question and its answer; `kind` groups questions in evaluation, if the source has it."""

    human: str
    gpt: str
    kind: str | None = None


@dataclass(frozen=True)
class Sample:
    """A conversation, about an image (its encoded bytes, as they were found) or about none."""

    id: str
    image: bytes | None
    turns: tuple[Turn, ...]
