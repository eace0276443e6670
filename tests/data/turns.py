"""Changes to samples that are questions and answers about one picture, or none."""

from __future__ import annotations

from dataclasses import replace

from gemoe_ds.data.turn import Picture, Sample, Turn, of_turns


def turns_of(sample: Sample) -> list[Turn]:
    said = zip(sample.questions, sample.answers, strict=True)
    return [Turn(question, answer.content, answer.kind) for question, answer in said]


def with_turns(sample: Sample, *turns: Turn) -> Sample:
    return of_turns(sample.id, sample.images[0] if sample.images else None, turns)


def with_image(sample: Sample, data: bytes) -> Sample:
    return replace(sample, images=(Picture(data),))


def cut_image(sample: Sample, size: int) -> Sample:
    """Its picture ends too early."""
    return with_image(sample, sample.images[0].data[:size])
