"""A conversation as token ids: those that the model's own processor gives."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

from gemoe_ds.data.filling import Filled, Part, parts_of, refusal
from gemoe_ds.data.turn import Sample
from gemoe_ds.models.chat import END, IMAGE, TEXT, ChatTemplate


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    bos_token_id: int
    eos_token_id: int
    pad_token_id: int

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, split_special_tokens: bool
    ) -> Mapping[str, Any]:
        """`input_ids` of several texts, lists of int."""

    @property
    def all_special_ids(self) -> list[int]:
        """Of the tokens that are no text."""

    def convert_tokens_to_ids(self, tokens: str) -> Any:
        """The id of a special token."""

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id."""


class TurnTokens(NamedTuple):
    """Token ids of an answer that is learned, and of all that stands between it and the one before:
    its question, what begins the sequence, answers that are not learned and their questions."""

    question: list[list[int]]  # cut where images stand
    answer: list[int]
    end: list[int]  # what ends the answer

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Of question, answer and end."""
        return sum(map(len, self.question)), len(self.answer), len(self.end)


@dataclass
class _Text:
    """Text that has no special token in it, and its ids."""

    text: str
    ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class ConversationTokenizer:
    """Fills a chat's templates and tokenises them.

    A special token inside a text (`</s>` on a page about HTML) is tokenised as ordinary characters,
    except for the tokens in `chat.obeyed`.
    """

    tokenizer: Tokenizer
    chat: ChatTemplate

    def __call__(
        self, samples: Sequence[Sample], *, to_answer: bool = False
    ) -> Iterator[list[TurnTokens]]:
        """The answers of each sample that are learned, tokenised at once; nothing of one that
        `refusal` speaks of. `to_answer`: its last answer is left out."""
        conversations = [[] if self.refusal(s) else parts_of(s, self.chat) for s in samples]
        if to_answer:
            conversations = [parts[:-1] for parts in conversations]
        filled = [[part.filled for part in parts] for parts in conversations]
        for parts, ids in zip(conversations, self._ids(filled), strict=True):
            yield _turns(parts, ids)

    def refusal(self, sample: Sample) -> str | None:
        """Why this chat, or its tokenizer, has no words for a sample; None if it has."""
        if sample.messages and sample.messages[0].role == "text" and self._lacking:
            return (
                f"it is a plain text and needs {self._lacking}, which the tokenizer does not have"
            )
        return refusal(sample, self.chat)

    @cached_property
    def _lacking(self) -> str:
        """A special token that plain texts need and that is not there."""
        pieces = (piece for piece in self.chat.pieces(self.chat.document) if piece != TEXT)
        marks = [piece for piece in pieces if self.chat.is_mark(piece) and piece != END]
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        return next((m for m in marks if self._special(m) in (None, unknown)), "")

    def prompt(self, asked: Filled, *, system: str | None, answer: str) -> list[list[int]]:
        """A question to be answered, cut where its images stand; `answer`: what has been said."""
        answered = [(self.chat.answer.partition(END)[0], answer)] if answer else []
        filled = [self.chat.begun(system), asked, *answered]
        ((start_ids,), question, *rest) = self._ids([filled])[0]
        question[0] = start_ids + question[0]
        question[-1] = question[-1] + [token for (ids,) in rest for token in ids]
        return question

    def written(self, prompt: str, image_mark: str) -> list[list[int]]:
        """Token ids of a prompt that is text already, cut where `image_mark` stands.

        The special tokens that the templates name are spelled in it. Whatever else looks like one
        is text. What is tokenised by template (no `joined` chat) is cut where an answer begins.
        """
        chat = self.chat
        cuts: list[list[int | _Text]] = [[]]
        special = {token: self._special(token) for token in (*chat.named, *chat.obeyed)}
        for mark, token in (("{bos}", "bos_token"), ("{eos}", "eos_token")):
            if chat.names(mark.strip("{}")):
                special[getattr(self.tokenizer, token)] = self._special(mark)
        known = "|".join(map(re.escape, sorted({image_mark, *special}, key=len, reverse=True)))
        for stretch in [prompt] if chat.joined else chat.answer_begins.split(prompt):
            for piece in re.split(f"({known})", stretch):
                if piece == image_mark:
                    cuts.append([])
                elif piece:
                    cuts[-1].append(special[piece] if piece in special else _Text(piece))
        self._tokenize([[part] for cut in cuts for part in cut if isinstance(part, _Text)])
        return [_joined(cut) for cut in cuts]

    @cached_property
    def end_ids(self) -> set[int]:
        """Tokens at which writing an answer ends."""
        (((_, end),),) = self._ids([[(self.chat.answer, "")]])
        vocabulary = self.tokenizer.get_vocab()
        stops = {vocabulary[token] for token in self.chat.stops if token in vocabulary}
        return stops | ({*end[:1]} or {self.tokenizer.eos_token_id})

    def _ids(self, conversations: Sequence[Sequence[Filled]]) -> list[list[list[list[int]]]]:
        """Token ids of templates with their texts, each cut where {image} or {end} stands.

        Text between special tokens is tokenised at once, over the borders of templates too if the
        chat is `joined`. What goes over a cut then is told apart as the models' own code does it:
        by the number of tokens up to there.
        """
        runs: list[list[_Text]] = []
        cuts = [self._cut(filled, runs) for filled in conversations]
        self._tokenize([run for run in runs if run])
        return [[[_joined(piece) for piece in cut] for cut in templates] for templates in cuts]

    def _cut(
        self, filled: Sequence[Filled], runs: list[list[_Text]]
    ) -> list[list[list[int | _Text]]]:
        """Templates in their pieces; a list of `runs` gets the texts that nothing parts."""
        templates = []
        runs.append([])
        for template, text in filled:
            pieces: list[list[int | _Text]] = [[]]
            templates.append(pieces)
            if not self.chat.joined:
                runs.append([])
            for part in self._parts(template, text):
                if isinstance(part, _Text):
                    runs[-1].append(part)
                elif part != END:
                    runs.append([])  # a special token or an image parts the text around it
                if isinstance(part, str):
                    pieces.append([])
                else:
                    pieces[-1].append(part)
        return templates

    def _parts(self, template: str, text: str | tuple[str, ...]) -> Iterator[int | str | _Text]:
        """Ids of special tokens, text, and the marks {image} and {end}."""
        for piece in self.chat.pieces(template):
            if piece in (IMAGE, END):
                yield piece
            elif self.chat.is_mark(piece):
                yield self._special(piece)
            else:
                before, is_around, after = piece.partition(TEXT)
                around = ((text,) if isinstance(text, str) else text) if is_around else ("",)
                for place, part in enumerate(around):
                    if place:
                        yield IMAGE
                    stretches = self._obeyed.split(part)
                    stretches[0] = before * (place == 0) + stretches[0]
                    stretches[-1] += after * (place == len(around) - 1)
                    yield from self._stretches(stretches)

    def _stretches(self, stretches: list[str]) -> Iterator[int | _Text]:
        """Every other one is a token that is obeyed."""
        for index, stretch in enumerate(stretches):
            if index % 2:
                yield self.tokenizer.convert_tokens_to_ids(stretch)
            elif stretch:
                yield _Text(stretch)

    def _special(self, token: str) -> int:
        if token == "{bos}":
            return self.tokenizer.bos_token_id
        if token == "{eos}":
            return self.tokenizer.eos_token_id
        return self.tokenizer.convert_tokens_to_ids(token)

    @cached_property
    def _obeyed(self) -> re.Pattern[str]:
        vocabulary = self.tokenizer.get_vocab() if self.chat.obeyed else {}
        tokens = [re.escape(token) for token in self.chat.obeyed if token in vocabulary]
        return re.compile(f"({'|'.join(tokens)})" if tokens else r"(\b\B)")  # or nothing at all

    def _tokenize(self, runs: list[list[_Text]]) -> None:
        texts = [text for run in runs for text in accumulate(piece.text for piece in run)]
        if not texts:
            return
        found = iter(
            self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        )
        for run in runs:
            heads = [next(found) for _ in run]
            whole, first = heads[-1], 0
            for piece, head in zip(run, heads, strict=True):
                last = max(first, len(head))
                piece.ids = whole[first:last]
                first = last


def _turns(parts: Sequence[Part], ids: Sequence[list[list[int]]]) -> list[TurnTokens]:
    """Answers that are learned, with what stands before each; the last one may not be there."""
    turns: list[TurnTokens] = []
    before: list[list[int]] = [[]]
    for part, pieces in zip(parts, ids, strict=True):
        if part.is_learned:
            answer, end = pieces
            if before == [[]]:  # nothing predicts the first token of a sequence
                before, answer = [answer[:1]], answer[1:]
            turns.append(TurnTokens(before, answer, end))
            before = [[]]
        elif part.is_answer:
            before[-1] = [*before[-1], *itertools.chain(*pieces)]
        else:
            before[-1] = before[-1] + pieces[0]
            before += pieces[1:]
    if before != [[]]:
        turns.append(TurnTokens(before, [], []))
    return turns


def _joined(pieces: list[int | _Text]) -> list[int]:
    ids: list[int] = []
    for piece in pieces:
        ids += piece.ids if isinstance(piece, _Text) else [piece]
    return ids
