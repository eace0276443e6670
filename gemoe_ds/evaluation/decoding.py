"""How the answers of a batch are written: which token comes next, and where a text ends.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemoe_ds.evaluation.benchmarks.requests import Writing

_SPARE = 8  # tokens beyond those of a stop string: the first of a stretch may be decoded otherwise


class Sampler:
    """The next token of every sequence, as its `Writing` says.

    Each sequence draws from random numbers of its own, one a token, so that what it writes depends
    neither on the batch nor on the rank.
    """

    def __init__(self, writings: Sequence[Writing], seeds: Sequence[int]) -> None:
        self._drawn = [
            (row, writing, np.random.default_rng(seed))
            for row, (writing, seed) in enumerate(zip(writings, seeds, strict=True))
            if writing.temperature > 0
        ]

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """Logits float32 [B, V] -> token ids [B]"""
        chosen_B = logits_BV.argmax(-1)
        if self._drawn:
            rows = [row for row, _, _ in self._drawn]
            drawn = [
                _at(likely(logits_V, how), random.random())
                for logits_V, (_, how, random) in zip(logits_BV[rows], self._drawn, strict=True)
            ]
            chosen_B[rows] = torch.stack(drawn)
        return chosen_B


def likely(logits_V: Tensor, how: Writing) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn, the likeliest first, and their probabilities, float64.

    Temperature, then `top_k`, then `top_p`: the fewest tokens that have so much together.
    """
    scaled_V, ids_V = (logits_V.double() / how.temperature).sort(descending=True, stable=True)
    if how.top_k:
        scaled_V, ids_V = scaled_V[: how.top_k], ids_V[: how.top_k]
    p_V = scaled_V.softmax(-1)
    number = int((p_V.cumsum(-1) - p_V < how.top_p).sum().clamp(min=1))
    return ids_V[:number], p_V[:number] / p_V[:number].sum()


def _at(likely: tuple[Tensor, Tensor], drawn: float) -> Tensor:
    """The token at this place, from 0 to 1, of their probabilities side by side."""
    ids_V, p_V = likely
    place = int((p_V.cumsum(-1) <= drawn).sum())
    return ids_V[min(place, len(ids_V) - 1)]


class StopStrings:
    """Where each text ends: before the first of its strings, wherever tokens begin and end."""

    def __init__(self, tokenizer: Any, until: Sequence[Sequence[str]]) -> None:
        self._tokenizer = tokenizer
        self._until = [[stop for stop in stops if stop] for stops in until]
        # A token is one byte at least.
        self._tokens = [
            max((len(stop.encode()) for stop in stops), default=0) + _SPARE for stops in self._until
        ]

    def __call__(self, row: int, token_ids: list[int]) -> bool:
        """Whether the text of this row has ended; asked after each of its tokens."""
        stops = self._until[row]
        if not stops or not self._in(stops, token_ids[-self._tokens[row] :]):
            return False
        return self._in(stops, token_ids)

    def text(self, row: int, token_ids: list[int]) -> str:
        """Without special tokens, and cut where it ends."""
        text = self._decoded(token_ids)
        for stop in self._until[row]:  # one after the other, as lm-eval does it
            text = text.split(stop)[0]
        return text

    def _in(self, stops: list[str], token_ids: list[int]) -> bool:
        text = self._decoded(token_ids)
        return any(stop in text for stop in stops)

    def _decoded(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text
