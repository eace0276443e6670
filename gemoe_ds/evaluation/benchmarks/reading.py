"""Documents as what a model reads: contexts with their continuations, or prompts to continue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import IntEnum

from gemoe_ds.data.collate import Collator, Encoded
from gemoe_ds.errors import DataError
from gemoe_ds.evaluation.benchmarks.likelihood import CHEAP, Context
from gemoe_ds.evaluation.benchmarks.requests import Request
from gemoe_ds.evaluation.benchmarks.text_tokens import TextTokens

# A request and the tokens that its prompt may have -> the prompt, cut on the left if need be.
EncodePrompt = Callable[[Request, int], Encoded]


class Work(IntEnum):
    """What the model does for a document: ranks that share experts do the same at a time."""

    ONE_FORWARD = 0
    TWO_FORWARDS = 1  # contexts, then continuations that share them
    WRITE = 2


@dataclass(frozen=True)
class Size:
    """How much memory a document takes."""

    work: Work
    rows: int
    tokens: int  # of the longest row, with what it will have written


@dataclass
class Document:
    """One that is ready for the model."""

    requests: list[Request]
    rows: int = 0
    tokens: int = 0  # of the longest row
    cut: list[int] = field(default_factory=list)  # tokens of each request
    # To score:
    contexts: list[Context] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)  # of each continuation the place of its request
    # To write, for each request:
    prompts: list[Encoded] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)  # tokens
    is_shown: bool = False  # its answer's tokens are kept


class Reader:
    """The same on every rank and in every thread."""

    def __init__(self, collator: Collator, show: EncodePrompt, num_workers: int) -> None:
        """`show` encodes the prompts of requests that have pictures, if only an empty list; so many
        threads open and resize them."""
        self.collator, self._show = collator, show
        self._workers = ThreadPoolExecutor(num_workers)
        self.tokens = TextTokens(
            collator.tokenizer,
            collator.max_length,
            begins=collator.conversations.chat.bos_before_text,
        )

    def size(self, requests: Sequence[Request]) -> Size:
        """About, in little time: a picture is not opened, and taken for no token."""
        if not requests:
            return Size(Work.ONE_FORWARD, 0, 1)
        first, lengths = requests[0], [self.tokens.length(request) for request in requests]
        if len({request.kind == "generate" for request in requests}) > 1:
            raise DataError(
                f"{first.task}, document {first.doc_id}: is asked to write and to score; leave the "
                "task out"
            )
        most = self.collator.max_length
        if first.kind == "generate":
            rooms = [self._limit(request) for request in requests]
            pairs = zip(lengths, rooms, strict=True)
            tokens = [min(before, most - room) + room for (before, _), room in pairs]
            return Size(Work.WRITE, len(requests), max(tokens))
        tokens = [min(before + behind, most) for before, behind in lengths]
        long: dict[str, int] = {}
        for request, (before, behind) in zip(requests, lengths, strict=True):
            long[request.context] = long.get(request.context, 0) + (behind > 1 and before > CHEAP)
        shared = any(number > 1 for number in long.values())
        rows = len(requests) if shared else len(long)
        return Size(Work.TWO_FORWARDS if shared else Work.ONE_FORWARD, rows, max(tokens))

    def read_all(self, asked: Sequence[Sequence[Request]], work: Work) -> list[Document]:
        """Documents, by what is asked about each."""
        has_pictures = bool(asked) and asked[0][0].images is not None
        each = self._workers.map if has_pictures else map
        return list(each(lambda requests: self.read(requests, work), asked))

    def read(self, requests: Sequence[Request], work: Work) -> Document:
        """What the model needs; nothing is shared unless there are two forwards."""
        document = Document(list(requests))
        if work == Work.WRITE:
            self._add_prompts(document)
        else:
            self._add_contexts(document, work)
        return document

    def _limit(self, request: Request) -> int:
        """Tokens that the answer may have, or one if it is as many as there is room for."""
        limit, most = request.writing.max_new_tokens, self.collator.max_length
        if limit is not None and not 0 < limit < most:
            raise DataError(
                f"{request.task}: answers of up to {limit:,} tokens are asked for, and "
                f"data.max_length={most} leaves no room for a question; raise data.max_length"
            )
        return limit or 1

    def _add_prompts(self, document: Document) -> None:
        most = self.collator.max_length
        for request in document.requests:
            room = self._limit(request)
            encode = self._plain if request.images is None else self._show
            prompt = encode(request, most - room)
            if request.writing.max_new_tokens is None:
                room = most - len(prompt.input_ids)
            document.prompts.append(prompt)
            document.limits.append(room)
            document.cut.append(prompt.cut_tokens)
        document.rows = len(document.prompts)
        document.tokens = max(
            len(prompt.input_ids) + room
            for prompt, room in zip(document.prompts, document.limits, strict=True)
        )

    def _add_contexts(self, document: Document, work: Work) -> None:
        found: dict[tuple[int, ...], Context] = {}
        for place, request in enumerate(document.requests):
            if request.images is not None:
                raise DataError(
                    f"{request.task}: scores continuations behind pictures, which `gemoe "
                    "benchmark` cannot do; leave the task out"
                )
            pairs = self.tokens.pairs(request)
            document.cut.append(sum(pair.cut for pair in pairs))
            for pair in pairs:
                if pair.context not in found:
                    prompt = Encoded(0, request.task)
                    prompt.add(list(pair.context))
                    found[pair.context] = Context(request.doc_id, prompt)
                found[pair.context].continuations[len(document.asked)] = pair.continuation
                document.asked.append(place)
        may_share = work == Work.TWO_FORWARDS
        document.contexts = [row for one in found.values() for row in one.rows(may_share)]
        document.rows = len(document.asked) if may_share else len(document.contexts)
        document.tokens = max((context.longest for context in document.contexts), default=1)

    def _plain(self, request: Request, most: int) -> Encoded:
        prompt = Encoded(0, f"{request.task}, document {request.doc_id}")
        room = self.collator.max_length - most
        ids, prompt.cut_tokens = self.tokens.prompt(request.context, room)
        prompt.add(ids)
        return prompt
