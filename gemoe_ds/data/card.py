"""What a folder of samples holds, counted: the data card that analysis/data_card.py shows.

Counts go over all samples; nothing but texts and sizes is read, and the bytes of pictures are not.
Shapes: N samples.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemoe_ds.console import Progress
from gemoe_ds.data.conversation import Tokenizer
from gemoe_ds.data.lengths import Cut, Lengths
from gemoe_ds.data.sample import Sample, SampleFolder
from gemoe_ds.data.turn import MARK

VERSION = 1
_BINS = 40  # of a histogram
_PLACED = 3000  # pictures of which the size itself is kept, for the plot
_NAMED = 3  # duplicates
_AT_ONCE = 512  # samples that are tokenised together


@dataclass(frozen=True)
class Tokens:
    """Of every sample, by a recipe's chat and pictures or by a tokenizer alone."""

    by: str  # what counted them
    length_N: np.ndarray  # uncut
    image_N: np.ndarray
    target_N: np.ndarray  # that are learned, as far as they fit
    max_length: int | None = None
    cut_N: np.ndarray | None = None  # answers that do not fit, of samples that are used
    is_left_out_N: np.ndarray | None = None  # without a target, broken, or dropped

    @classmethod
    def of_lengths(cls, by: str, lengths: Lengths, cut: Cut, max_length: int) -> Tokens:
        is_left_out_N = cut.is_bad_N | cut.is_dropped_N
        return cls(
            by,
            lengths.whole_N,
            lengths.image_N,
            cut.targets_N,
            max_length,
            np.where(is_left_out_N, 0, cut.cut_answers_N),
            is_left_out_N,
        )


@dataclass
class _Source:
    """Of the samples of one source."""

    samples: int = 0
    pictures: int = 0
    answers: int = 0
    characters: int = 0
    rows: list[int] = field(default_factory=list)


class _Counts:
    """What is counted sample by sample."""

    def __init__(self) -> None:
        self.sources: defaultdict[str, _Source] = defaultdict(_Source)
        self.roles: Counter[str] = Counter()
        self.answers: Counter[int] = Counter()  # of a sample -> samples
        self.pictures: Counter[int] = Counter()
        self.unlearned = 0
        self.sizes: list[tuple[int, int]] = []
        self.stored: set[Any] = set()
        self.seen: set[bytes] = set()
        self.duplicates = 0
        self.first_duplicates: list[str] = []

    def add(self, row: int, sample: Sample, stored: list[Any]) -> None:
        learned = [m for m in sample.messages if m.loss]
        source = self.sources[sample.source]
        source.samples += 1
        source.pictures += len(sample.images)
        source.answers += len(learned)
        source.characters += sum(len(m.content) for m in sample.messages)
        source.rows.append(row)
        self.roles.update(m.role for m in sample.messages)
        self.unlearned += sum(m.role == "assistant" and not m.loss for m in sample.messages)
        self.answers[len(learned)] += 1
        self.pictures[len(sample.images)] += 1
        self.sizes += [(image.width, image.height) for image in sample.images]
        self.stored.update(stored)
        content = repr([(m.role, m.content, m.loss) for m in sample.messages] + stored).encode()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        if digest in self.seen:
            self.duplicates += 1
            self.first_duplicates += [sample.id] * (len(self.first_duplicates) < _NAMED)
        self.seen.add(digest)


def card_of(samples: SampleFolder, tokens: Tokens | None = None) -> dict[str, Any]:
    """As card.json has it."""
    counts = _Counts()
    for row in Progress(range(len(samples)), desc="counting", unit="sample", delay=1.0):
        counts.add(row, samples.outline(row), samples.stored_at(row))
    manifest = samples.manifest
    return {
        "card": VERSION,
        "folder": str(samples.path),
        "made_from": manifest["source"],
        "fingerprint": samples.fingerprint,
        "schema": manifest["schema"],
        "samples": len(samples),
        "megabytes": round(sum(shard["bytes"] for shard in manifest["shards"]) / 1e6, 1),
        "sources": [
            _source_row(name, source, tokens) for name, source in sorted(counts.sources.items())
        ],
        "messages": dict(counts.roles),
        "answers_not_learned": counts.unlearned,
        "answers_a_sample": _as_lists(counts.answers),
        "pictures_a_sample": _as_lists(counts.pictures),
        "pictures": _pictures(counts),
        "duplicates": {"samples": counts.duplicates, "first": counts.first_duplicates},
        "tokens": None if tokens is None else _tokens(tokens),
        "rows_dropped": manifest["num_dropped"],
        "dropped": manifest.get("dropped_groups", []),
        "notes": manifest.get("notes", {}),
    }


def _source_row(name: str, source: _Source, tokens: Tokens | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "source": name,
        "samples": source.samples,
        "pictures": source.pictures,
        "answers": source.answers,
        "characters": source.characters,
    }
    if tokens is not None:
        row["tokens"] = int(tokens.length_N[source.rows].sum())
        row["image_tokens"] = int(tokens.image_N[source.rows].sum())
        row["targets"] = int(tokens.target_N[source.rows].sum())
        if tokens.cut_N is not None and tokens.is_left_out_N is not None:
            row["cut_answers"] = int(tokens.cut_N[source.rows].sum())
            row["left_out"] = int(tokens.is_left_out_N[source.rows].sum())
    return row


def _pictures(counts: _Counts) -> dict[str, Any]:
    sizes = np.array(counts.sizes, dtype=np.int64).reshape(-1, 2)
    known = sizes[sizes[:, 0] > 0]
    shown = known[:: -(-len(known) // _PLACED)] if len(known) else known
    return {
        "shown": len(sizes),
        "stored": len(counts.stored),
        "size_unknown": len(sizes) - len(known),
        "width": _spread(known[:, 0]),
        "height": _spread(known[:, 1]),
        "sizes": shown.tolist(),
    }


def _tokens(tokens: Tokens) -> dict[str, Any]:
    found: dict[str, Any] = {
        "by": tokens.by,
        "total": int(tokens.length_N.sum()),
        "of_images": int(tokens.image_N.sum()),
        "targets": int(tokens.target_N.sum()),
        "a_sample": _spread(tokens.length_N),
        "histogram": _histogram(tokens.length_N),
        "max_length": tokens.max_length,
    }
    if tokens.cut_N is not None and tokens.is_left_out_N is not None:
        found["cut_answers"] = int(tokens.cut_N.sum())
        found["cut_samples"] = int((tokens.cut_N > 0).sum())
        found["left_out"] = int(tokens.is_left_out_N.sum())
    return found


def _spread(value_N: np.ndarray) -> dict[str, float] | None:
    """Smallest, 5 %, median, mean, 95 % and largest; None of nothing."""
    if not len(value_N):
        return None
    low, middle, high = np.percentile(value_N, (5, 50, 95))
    return {
        "min": int(value_N.min()),
        "p5": float(low),
        "median": float(middle),
        "mean": round(float(value_N.mean()), 1),
        "p95": float(high),
        "max": int(value_N.max()),
    }


def _histogram(value_N: np.ndarray) -> dict[str, list[int]]:
    """On a scale of equal ratios."""
    edges = np.geomspace(max(int(value_N.min()), 1), int(value_N.max()) + 1, _BINS + 1)
    edges = np.unique(np.round(edges).astype(np.int64))  # of whole numbers: no bin without any
    counts, _ = np.histogram(value_N, edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _as_lists(counts: Counter[int]) -> dict[str, list[int]]:
    return {"number": sorted(counts), "samples": [counts[number] for number in sorted(counts)]}


def text_tokens(samples: SampleFolder, tokenizer: Tokenizer, by: str) -> Tokens:
    """Of the messages' texts, without a template and without pictures."""
    length_N = np.zeros(len(samples), dtype=np.int64)
    target_N = np.zeros(len(samples), dtype=np.int64)
    for first in Progress(range(0, len(samples), _AT_ONCE), desc="tokens", unit="batch", delay=1.0):
        rows, texts, is_learned = [], [], []
        for row in range(first, min(first + _AT_ONCE, len(samples))):
            for message in samples.outline(row).messages:
                rows.append(row)
                texts.append(message.content.replace(MARK, ""))
                is_learned.append(message.loss)
        ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        sizes = np.array([len(found) for found in ids])
        np.add.at(length_N, rows, sizes)
        np.add.at(target_N, rows, np.where(is_learned, sizes, 0))
    return Tokens(by, length_N, np.zeros_like(length_N), target_N)
