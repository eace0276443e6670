"""Plain text as token ids, cut into context and continuation as lm-eval 0.4 does it for `hf`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gemoe_ds.errors import DataError
from gemoe_ds.evaluation.benchmarks.requests import Request


@dataclass(frozen=True)
class Pair:
    """A continuation that is scored, and what stands before it: one token at least."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    cut: int = 0  # tokens, on the left of the context


class TextTokens:
    """A special token that is written out in a text is that token, as in lm-eval."""

    def __init__(self, tokenizer: Any, max_length: int, *, begins: bool = False) -> None:
        """`begins`: a text begins with the first token, even if the tokenizer does not add it."""
        self.tokenizer, self.max_length, self._begins = tokenizer, max_length, begins
        first = tokenizer.bos_token_id
        self.first: int = tokenizer.eos_token_id if first is None else first
        self._first_text: str = tokenizer.decode([self.first])
        self._encode_context = lru_cache(16)(self.encode)  # which several continuations have

    def length(self, request: Request) -> tuple[int, int]:
        """Tokens of context and continuation, about: where they meet, one may be of both."""
        behind = self.tokenizer.encode(request.continuation, add_special_tokens=False)
        return max(len(self._encode_context(request.context)), 1), len(behind)

    def encode(self, text: str) -> list[int]:
        """With what the tokenizer puts around a text, unless it begins with the first token."""
        has_begun = text.startswith(self._first_text)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=not has_begun)
        if self._begins and not has_begun and ids[:1] != [self.first]:
            return [self.first, *ids]
        return ids

    def prompt(self, text: str, room: int) -> tuple[list[int], int]:
        """Ids of a text, cut on the left to leave so much `room`, and how many were cut."""
        ids = self.encode(text) or [self.first]
        cut = max(len(ids) - (self.max_length - room), 0)
        return ids[cut:], cut

    def pairs(self, request: Request) -> list[Pair]:
        """One; of `rolling` one for each stretch of `max_length` tokens, none for an empty text."""
        if request.kind == "rolling":
            return self._windows(self.encode(request.context))
        context, continuation = self._pair(request.context, request.continuation)
        if not continuation or len(continuation) > self.max_length:
            raise DataError(
                f"{request.task}, document {request.doc_id}: its continuation has "
                f"{len(continuation):,} tokens; from 1 to data.max_length={self.max_length} can be "
                "scored: raise data.max_length, or leave the task out"
            )
        cut = max(len(context) + len(continuation) - self.max_length - 1, 0)
        return [Pair(tuple(context[cut:]), tuple(continuation), cut)]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not context:
            ids: list[int] = self.tokenizer.encode(continuation, add_special_tokens=False)
            return (ids[:1], ids[1:]) if ids[:1] == [self.first] else ([self.first], ids)
        kept = context.rstrip()  # spaces at its end belong to the first word behind it
        before, whole = self._encode_context(kept), self.encode(context + continuation)
        return before or [self.first], whole[len(before) :]

    def _windows(self, ids: list[int]) -> list[Pair]:
        """Every token once; the last stretch has as many tokens before it as there is room for."""
        found = []
        for start in range(0, len(ids), self.max_length):
            continuation = ids[start : start + self.max_length]
            first = start + len(continuation) - self.max_length - 1
            context = ids[max(first, 0) : start] if start else [self.first]
            found.append(Pair(tuple(context), tuple(continuation)))
        return found
