"""Samples -> Batch: token ids, targets and pixels of one micro-batch.

A sequence is `<s> <image>*n`, then for each turn ` USER: question ASSISTANT: answer </s>`; the loss
counts on answers and their end. Shapes: B sequences, S tokens, N images of C x H x W.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gemoe_ds.data.sample import Sample
from gemoe_ds.errors import DataError

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Padding stands right of everything; the model shifts the labels."""

    input_ids_BS: Tensor  # int64
    labels_BS: Tensor  # int64, -100: not a target
    is_valid_BS: Tensor  # bool, False: padding
    is_vision_BS: Tensor  # bool, image placeholders
    turn_BS: Tensor  # int16, the turn whose answer a token belongs to, -1 elsewhere
    pixels_NCHW: Tensor  # float32 in [-1, 1]
    ids: tuple[str, ...]
    rows: tuple[int, ...]  # their row numbers in the SampleFolder

    @property
    def num_targets(self) -> int:
        """Labels that count: the first position of a sequence predicts, but is not predicted."""
        return int((self.labels_BS[:, 1:] != IGNORE).sum())

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model's forward takes, by name."""
        names = ("input_ids_BS", "labels_BS", "is_valid_BS", "is_vision_BS", "pixels_NCHW")
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device) -> Batch:
        moved = {name: t.to(device, non_blocking=True) for name, t in self.inputs.items()}
        return replace(self, **moved)


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    bos_token_id: int
    eos_token_id: int
    pad_token_id: int

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, split_special_tokens: bool
    ) -> dict[str, list[list[int]]]:
        """Token ids of several texts."""


@dataclass(frozen=True)
class Encoded:
    """One sample as arrays, not yet padded."""

    row: int
    id: str
    input_ids: list[int]
    labels: list[int]
    turn: list[int]
    pixels_CHW: np.ndarray | None


class Collator:
    """Encodes samples (`encode`) and pads them to a batch (`batch`).

    A sequence longer than `max_length` ends at the last whole turn that fits; if not even the
    first one does, inside the first answer, which then counts for the loss but is of no turn, so
    that evaluation does not grade half an answer. A sample that has no target left is a DataError:
    its loss would silently be 0. Special tokens that stand in a text (a page about HTML has `</s>`)
    are spelled, not obeyed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        image_size: int,
        image_tokens: int,
        image_token_id: int,
        max_length: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.image_tokens = image_tokens
        self.image_token_id = image_token_id
        self.max_length = max_length

    def encode(self, row: int, sample: Sample) -> Encoded:
        tokenizer = self.tokenizer
        questions = [f" USER: {turn.human} ASSISTANT:" for turn in sample.turns]
        answers = [f" {turn.gpt}" for turn in sample.turns]
        tokens = tokenizer(
            [*questions, *answers], add_special_tokens=False, split_special_tokens=True
        )["input_ids"]
        placeholders = [self.image_token_id] * (self.image_tokens if sample.image else 0)
        input_ids = [tokenizer.bos_token_id, *placeholders]
        labels, turn = [IGNORE] * len(input_ids), [-1] * len(input_ids)
        num_turns = len(questions)
        for index, (question, answer) in enumerate(
            zip(tokens[:num_turns], tokens[num_turns:], strict=True)
        ):
            room = self.max_length - len(input_ids) - len(question)
            if len(answer) + 1 > room:
                if index == 0 and room > 0:
                    input_ids += [*question, *answer[:room]]
                    labels += [IGNORE] * len(question) + answer[:room]
                    turn += [-1] * (len(question) + room)
                break
            input_ids += [*question, *answer, tokenizer.eos_token_id]
            labels += [IGNORE] * len(question) + [*answer, tokenizer.eos_token_id]
            turn += [-1] * len(question) + [index] * len(answer) + [-1]
        if all(label == IGNORE for label in labels):
            raise DataError(
                f"sample {sample.id}: no answer fits into max_length={self.max_length} tokens "
                "(data.max_length); raise it or remove the sample"
            )
        pixels = None if sample.image is None else decode_image(sample, self.image_size)
        return Encoded(row, sample.id, input_ids, labels, turn, pixels)

    def batch(self, encoded: Sequence[Encoded]) -> Batch:
        length = max(len(e.input_ids) for e in encoded)
        ids = _padded([e.input_ids for e in encoded], length, self.tokenizer.pad_token_id)
        images = [e.pixels_CHW for e in encoded if e.pixels_CHW is not None]
        size = self.image_size
        pixels = torch.from_numpy(np.stack(images)) if images else torch.zeros(0, 3, size, size)
        lengths = torch.tensor([len(e.input_ids) for e in encoded])
        return Batch(
            input_ids_BS=ids,
            labels_BS=_padded([e.labels for e in encoded], length, IGNORE),
            is_valid_BS=torch.arange(length) < lengths[:, None],
            is_vision_BS=ids == self.image_token_id,
            turn_BS=_padded([e.turn for e in encoded], length, -1).to(torch.int16),
            pixels_NCHW=pixels.float().div_(127.5).sub_(1),
            ids=tuple(e.id for e in encoded),
            rows=tuple(e.row for e in encoded),
        )


def decode_image(sample: Sample, size: int) -> np.ndarray:
    """The image of a sample as uint8 [3, size, size]; DataError naming the sample if broken."""
    assert sample.image is not None
    try:
        with Image.open(io.BytesIO(sample.image)) as image:
            rgb = image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise almost anything on broken files
        raise DataError(
            f"sample {sample.id}: its image cannot be decoded: {error}; convert the data again"
        ) from error
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(rgb).transpose(2, 0, 1)


def _padded(rows: list[list[int]], length: int, value: int) -> Tensor:
    padded = np.full((len(rows), length), value)
    for into, row in zip(padded, rows, strict=True):
        into[: len(row)] = row
    return torch.from_numpy(padded)
