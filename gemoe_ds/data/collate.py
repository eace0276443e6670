"""Samples -> Batch: token ids, targets and pixels of one micro-batch.

A sequence is what the backbone's chat template says, with the backbone's tokens for the image in
it; the loss counts on answers and their end. Shapes: B sequences, S tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemoe_ds.data.bad_samples import BadSample
from gemoe_ds.data.conversation import ConversationTokenizer, Tokenizer, TurnTokens
from gemoe_ds.data.images import decode_image, shown_size
from gemoe_ds.data.turn import Sample
from gemoe_ds.errors import SampleError
from gemoe_ds.models.chat import ChatTemplate
from gemoe_ds.models.images import ON_HOST, ImageLayout, ProcessedImage
from gemoe_ds.models.inputs import ModelInputs

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """One micro-batch. The model shifts the labels."""

    input_ids_BS: Tensor  # int64
    labels_BS: Tensor  # int64, -100: not a target
    is_valid_BS: Tensor  # bool, False: padding
    is_vision_BS: Tensor  # bool, image placeholders
    turn_BS: Tensor  # int16, the turn whose answer a token belongs to, -1 elsewhere
    images: dict[str, Tensor]  # `pixels`, `feature_BS`, extras; see Backbone.hidden
    ids: tuple[str, ...]  # of the samples: one a sequence, or several behind each other
    rows: tuple[int, ...]  # their row numbers in the SampleFolder
    bad: tuple[BadSample, ...] = ()  # those that are left out; they keep their places
    cut_answers: int = 0  # answers that `max_length` has cut, or left no room for
    document_BS: Tensor | None = None  # int64: the number of each token's sample, where rows are
    # packed: see `ModelInputs`

    @property
    def num_targets(self) -> int:
        """Labels that count: the first position of a sequence predicts, but is not predicted."""
        return int((self.labels_BS[:, 1:] != IGNORE).sum())

    @property
    def inputs(self) -> dict[str, Any]:
        """What a model's forward takes, by name."""
        names = ["input_ids_BS", "labels_BS", "is_valid_BS", "is_vision_BS", "images"]
        names += [] if self.document_BS is None else ["document_BS"]
        return {name: getattr(self, name) for name in names}

    @property
    def model_inputs(self) -> ModelInputs:
        """The same without labels."""
        tensors = self.input_ids_BS, self.is_valid_BS, self.is_vision_BS, self.images
        return ModelInputs(*tensors, document_BS=self.document_BS)

    def per_sample(self, is_one_BS: Tensor) -> Tensor:
        """How many tokens of each sample are marked, int64, one for each of `rows`."""
        if self.document_BS is None:
            return is_one_BS.sum(1)
        counts = torch.zeros(len(self.rows), dtype=torch.int64)
        return counts.index_add(0, self.document_BS.flatten(), is_one_BS.flatten().long())

    def groups_with_tokens(self, num_groups: int) -> int:
        """Of its rows in so many groups, of as many one after the other."""
        return int(self.is_valid_BS.reshape(num_groups, -1).any(1).sum())

    def silenced(self) -> Batch:
        """The same with nothing in it that counts, for a rank that has run out of samples."""
        nothing_BS = torch.zeros_like(self.is_valid_BS)
        return replace(
            self, is_valid_BS=nothing_BS, labels_BS=torch.full_like(self.labels_BS, IGNORE)
        )

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """In memory from which a GPU copies while it computes."""
        return self._each(Tensor.pin_memory)

    def tensors(self) -> list[Tensor]:
        """What a model's forward takes on its device."""
        inputs = self.inputs
        images = inputs.pop("images").items()
        return [*(tensor for name, tensor in images if name not in ON_HOST), *inputs.values()]

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        inputs = self.inputs
        images: Any = {
            name: tensor if name in ON_HOST else change(tensor)
            for name, tensor in inputs.pop("images").items()
        }
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in inputs.items()}
        return replace(self, images=images, **changed)


@dataclass
class Encoded:
    """One sample as arrays, not yet padded."""

    row: int
    id: str
    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)
    is_vision: list[bool] = field(default_factory=list)
    feature: list[int] = field(default_factory=list)
    images: list[ProcessedImage] = field(default_factory=list)
    cut_answers: int = 0  # that are not there in whole
    cut_tokens: int = 0  # of a prompt's text, on its left
    bad: BadSample | None = None  # why it is left out: it is padding from end to end
    parts: tuple[Encoded, ...] = ()  # several samples, whose row this is: see data/pack.py

    def add(self, ids: list[int], *, labels: list[int] | None = None, turn: int = -1) -> None:
        self.input_ids += ids
        self.labels += labels or [IGNORE] * len(ids)
        self.turn += [turn] * len(ids)
        self.is_vision += [False] * len(ids)
        self.feature += [-1] * len(ids)

    def add_question(self, parts: list[list[int]], images: Sequence[ProcessedImage]) -> None:
        """What stands before, between and behind its images, and they."""
        self.add(parts[0])
        for image, part in zip(images, parts[1:], strict=True):
            self._add_image(image)
            self.add(part)

    def _add_image(self, image: ProcessedImage) -> None:
        start, rows_before = len(self.input_ids), self.num_features
        self.add(image.input_ids)
        self.is_vision[start:] = [True] * len(image.input_ids)
        feature_P = image.feature_P
        self.feature[start:] = np.where(feature_P < 0, -1, feature_P + rows_before).tolist()
        self.images.append(image)

    @property
    def num_features(self) -> int:
        """Rows that the model makes of its images."""
        return sum(image.num_features for image in self.images)


class Collator:
    """Encodes samples (`encode`) and pads them to a batch (`batch`).

    A sequence longer than `max_length` ends at the last whole turn that fits; if not even the
    first one does, inside the first answer, which then counts for the loss but is of no turn, so
    that evaluation does not grade half an answer. A sample that has no target left, or whose image
    cannot be decoded, is a SampleError, or padding in its place (`encode_or_leave_out`). Without a
    `layout` samples must have no image.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        layout: ImageLayout | None,
        chat: ChatTemplate,
        *,
        max_length: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.layout = layout
        self.conversations = ConversationTokenizer(tokenizer, chat)
        self.max_length = max_length
        self._dummy = layout.dummy() if layout else None
        self._num_tokens = lru_cache(4096)(layout.num_tokens if layout else lambda *size: 0)

    def encode(self, row: int, sample: Sample) -> Encoded:
        """SampleError for a sample that this model cannot read, or that has no target left."""
        tokens, places = self.image_tokens(sample), itertools.count()
        (turns,) = self.tokenized([sample])
        encoded = Encoded(row, sample.id, cut_answers=len(turns))
        lengths = turn_lengths(turns, tokens)
        is_text = sample.messages[0].role == "text"
        for index, (turn, (length, *rest, _)) in enumerate(zip(turns, lengths, strict=True)):
            room = self.max_length - len(encoded.input_ids) - length
            fits = rest[0] + rest[1] <= room
            if not fits and (index > 0 or room <= 0):
                break
            images = [self._lay(sample, next(places)) for _ in turn.question[1:]]
            encoded.add_question(turn.question, images)
            if not fits:
                encoded.add(turn.answer[:room], labels=turn.answer[:room])
                break
            encoded.add(turn.answer, labels=turn.answer, turn=-1 if is_text else index)
            encoded.add(turn.end, labels=turn.end)
            encoded.cut_answers -= 1
        if all(label == IGNORE for label in encoded.labels):
            whole = sum(sum(length[:3]) for length in lengths)
            targets = sum(answer + end for _, answer, end, _ in lengths)
            raise without_target(sample.id, lengths[0][0], whole, targets, self.max_length)
        return encoded

    def encode_or_leave_out(self, row: int, sample: Sample, *, prompt: bool = False) -> Encoded:
        """As `encode` or `prompt`; padding in the place of a bad sample: the others keep theirs."""
        try:
            return self.prompt(row, sample) if prompt else self.encode(row, sample)
        except SampleError as error:
            bad = BadSample(row, sample.id, str(error), error.needs)
        encoded = Encoded(row, sample.id, bad=bad)
        encoded.add([self.tokenizer.pad_token_id])
        return encoded

    def prompt(self, row: int, sample: Sample) -> Encoded:
        """The conversation up to where its last answer would begin; for `batch(..., left=True)`."""
        self.image_tokens(sample)
        if sample.messages[0].role == "text":
            raise SampleError(
                f"sample {sample.id} is a plain text, in which no answer is asked for"
            )
        encoded, places = Encoded(row, sample.id), itertools.count()
        (turns,) = self.conversations([sample], to_answer=True)
        for turn in turns:
            images = [self._lay(sample, next(places)) for _ in turn.question[1:]]
            encoded.add_question(turn.question, images)
            encoded.add(turn.answer)
            encoded.add(turn.end)
        length = len(encoded.input_ids)
        if length > self.max_length:
            raise SampleError(
                f"sample {sample.id}: its prompt has {length:,} tokens and does not fit into "
                f"data.max_length={self.max_length}",
                needs=length,
            )
        return encoded

    def tokenized(self, samples: Sequence[Sample]) -> Iterator[list[TurnTokens]]:
        """What is learned of each sample; all of their texts go through the tokenizer at once. None
        of a sample whose messages `image_tokens` refuses."""
        return self.conversations(samples)

    @property
    def special_ids(self) -> set[int]:
        """Tokens that are no text."""
        return set(self.tokenizer.all_special_ids)

    @property
    def end_ids(self) -> set[int]:
        """Tokens that end an answer."""
        return self.conversations.end_ids

    def image_tokens(self, sample: Sample) -> list[int]:
        """How many stand for each picture, by its size alone; SampleError, naming the sample, for
        messages and pictures that this model cannot read."""
        if reason := self.conversations.refusal(sample):
            raise SampleError(f"sample {sample.id}: {reason}")
        number = len(sample.images)
        if number and self.layout is None:
            raise SampleError(
                f"sample {sample.id} has an image, and this backbone reads text only; "
                "choose other data or another model.backbone"
            )
        return [self._num_tokens(*shown_size(sample, n), number) for n in range(number)]

    def _lay(self, sample: Sample, place: int) -> ProcessedImage:
        assert self.layout is not None
        return self.layout(decode_image(sample, place), len(sample.images))

    def batch(self, encoded: Sequence[Encoded], *, left: bool = False) -> Batch:
        """Padded on the right, for training and scoring, or on the `left`, to be continued."""
        length = max(len(e.input_ids) for e in encoded)
        samples = [sample for e in encoded for sample in e.parts or (e,)]

        def padded(name: str, value: int) -> Tensor:
            return _padded([getattr(e, name) for e in encoded], length, value, left)

        return Batch(
            input_ids_BS=padded("input_ids", self.tokenizer.pad_token_id),
            labels_BS=padded("labels", IGNORE),
            is_valid_BS=_padded(list(map(_is_valid, encoded)), length, 0, left).bool(),
            is_vision_BS=padded("is_vision", False).bool(),
            turn_BS=padded("turn", -1).to(torch.int16),
            images=self._images(encoded, padded("feature", -1)),
            ids=tuple(sample.id for sample in samples),
            rows=tuple(sample.row for sample in samples),
            bad=tuple(sample.bad for sample in samples if sample.bad),
            cut_answers=sum(sample.cut_answers for sample in samples),
            document_BS=_documents(encoded, length) if any(e.parts for e in encoded) else None,
        )

    def _images(self, encoded: Sequence[Encoded], feature_BS: Tensor) -> dict[str, Tensor]:
        """The batch's images joined, or a dummy one that no position asks for."""
        if self._dummy is None:
            return {}
        images = [image for e in encoded for image in e.images] or [self._dummy]
        first = 0
        for sequence, e in zip(feature_BS, encoded, strict=True):
            sequence[sequence >= 0] += first
            first += e.num_features
        joined = {
            name: torch.from_numpy(np.concatenate([image.extras[name] for image in images]))
            for name in images[0].extras
        }
        pixels = torch.from_numpy(np.concatenate([image.pixels for image in images]))
        return {"pixels": pixels, "feature_BS": feature_BS, **joined}


def turn_lengths(
    turns: Sequence[TurnTokens], image_tokens: Sequence[int]
) -> list[tuple[int, int, int, int]]:
    """Tokens of each question with its pictures, answer, what ends that, and of the pictures."""
    tokens, lengths = iter(image_tokens), []
    for turn in turns:
        question, answer, end = turn.lengths
        of_images = sum(itertools.islice(tokens, len(turn.question) - 1))
        lengths.append((question + of_images, answer, end, of_images))
    return lengths


def without_target(
    sample_id: str, before: int, whole: int, targets: int, max_length: int
) -> SampleError:
    """Why a sample of so many tokens, of which so many stand before its first answer, has none."""
    if targets == 0:
        return SampleError(f"sample {sample_id}: its answers are empty, so that it has no target")
    return SampleError(
        f"sample {sample_id}: no answer fits into data.max_length={max_length}: {before:,} tokens "
        f"stand before the first one, and the sample has {whole:,}",
        needs=whole,
    )


def _is_valid(row: Encoded) -> list[int]:
    return [int(e.bad is None) for e in row.parts or (row,) for _ in e.input_ids]


def _documents(encoded: Sequence[Encoded], length: int) -> Tensor:
    """The number in the batch of each token's sample; padding has that of the last in its row."""
    numbers, document_BS = itertools.count(), np.empty((len(encoded), length), np.int64)
    for document_S, row in zip(document_BS, encoded, strict=True):
        start = 0
        for sample in row.parts or (row,):
            document_S[start:] = next(numbers)
            start += len(sample.input_ids)
    return torch.from_numpy(document_BS)


def _padded(rows: list[list[int]], length: int, value: int, left: bool) -> Tensor:
    padded = np.full((len(rows), length), value)
    for into, row in zip(padded, rows, strict=True):
        into[length - len(row) if left else 0 :][: len(row)] = row
    return torch.from_numpy(padded)
