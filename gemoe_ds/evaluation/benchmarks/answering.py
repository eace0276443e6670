"""Answers to all that tasks ask, over all ranks: block by block, and again from where it ended.

Every rank has as many rounds. A rank that has run out takes part in the exchange between ranks that
share experts, and counts nothing.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from gemoe_ds.analysis.benchmarks.files import MAX_SHOWN
from gemoe_ds.cluster.signals import stop_together
from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.console import Progress
from gemoe_ds.data.collate import Encoded
from gemoe_ds.engine.world import World, any_over_ranks
from gemoe_ds.errors import ConfigError, Stopped
from gemoe_ds.evaluation.benchmarks.likelihood import Scored, log_likelihoods
from gemoe_ds.evaluation.benchmarks.parts import PartWriter
from gemoe_ds.evaluation.benchmarks.plan import Block, TaskPlan, dealt
from gemoe_ds.evaluation.benchmarks.reading import Document, Reader, Work
from gemoe_ds.evaluation.benchmarks.requests import Answer, Request
from gemoe_ds.evaluation.benchmarks.shown import WritingK, shown_tokens
from gemoe_ds.evaluation.benchmarks.tasks import Task
from gemoe_ds.evaluation.decoding import Sampler, StopStrings
from gemoe_ds.evaluation.generate import alone, generate
from gemoe_ds.evaluation.routing import RoutingCounter
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.progress import EVALUATE, GENERATE, PROGRESS

WHERE = "between two blocks; the same command goes on"


@dataclass
class Answerer:
    """A model that answers documents; `together`: ranks share its experts, and do the same."""

    model: MoEModel
    reader: Reader
    world: World
    together: bool
    seed: int
    budget: int  # tokens of a batch: rows times the longest one
    say: Callable[[str], None] = field(default=lambda text: None)

    def __post_init__(self) -> None:
        collator = self.reader.collator
        tokenizer: Any = collator.tokenizer
        self._end_ids = collator.end_ids | {tokenizer.eos_token_id}

    def any_rank(self, here: bool) -> bool:
        return any_over_ranks(here, self.world.device) if self.together else alone(here)

    def answers(
        self, documents: Sequence[Document], work: Work, counter: RoutingCounter
    ) -> tuple[list[Answer], RoutingCounter]:
        """In the order of the documents, and what has counted them. Collective if together."""
        answers: list[Answer] = []
        waiting = list(self._batches(documents))
        while self.any_rank(bool(waiting)):
            batch = waiting.pop(0) if waiting else []
            # A batch that does not come to its end must have counted nothing.
            before = counter if self.together else copy.deepcopy(counter)
            try:
                answers += self._batch(batch, work, counter)
                continue
            except torch.OutOfMemoryError:
                if self.together or len(batch) < 2:
                    raise self._too_large(batch) from None
            counter = before
            torch.cuda.empty_cache()
            self.budget = sum(document.rows for document in batch) * batch[0].tokens // 2
            self.say(f"out of memory: goes on with --batch {self.budget}")
            waiting[:0] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        return answers, counter

    def _too_large(self, batch: Sequence[Document]) -> ConfigError:
        tokens = max(document.rows * document.tokens for document in batch)
        if self.together:
            return ConfigError(
                f"--batch {self.budget} is too much for the memory of rank {self.world.rank}; "
                "ranks share experts and cannot change it on the way: start again with half of it"
            )
        return ConfigError(
            f"{batch[0].requests[0].task}, document {batch[0].requests[0].doc_id}: its {tokens:,} "
            "tokens do not fit into memory alone; use a larger device, parallel.ep_size, or a "
            "smaller data.max_length"
        )

    def _batches(self, documents: Sequence[Document]) -> Iterator[list[Document]]:
        batch: list[Document] = []
        rows = longest = 0
        for document in documents:
            rows, longest = rows + document.rows, max(longest, document.tokens)
            if batch and rows * longest > 1.25 * self.budget:  # lengths were about right
                yield batch
                batch, rows, longest = [], document.rows, document.tokens
            batch.append(document)
        if batch:
            yield batch

    def _batch(
        self, batch: Sequence[Document], work: Work, counter: RoutingCounter
    ) -> list[Answer]:
        self.model.eval()
        if work == Work.WRITE:
            return self._written(batch, counter)
        ctx = self.model.ctx
        before, ctx.trace = ctx.trace, True
        try:
            scored = log_likelihoods(
                self.model,
                self.reader.collator,
                [context for document in batch for context in document.contexts],
                self.world.device,
                lambda kinds, docs, rows: counter.add(
                    ctx, kinds, np.array(docs), index_B=np.array(rows)
                ),
                shared=work == Work.TWO_FORWARDS,
            )
        finally:
            ctx.trace = before
        found = iter(scored)
        return [
            answer
            for document in batch
            for answer in _scored(document, [next(found) for _ in document.contexts])
        ]

    def _written(self, batch: Sequence[Document], counter: RoutingCounter) -> list[Answer]:
        collator = self.reader.collator
        tokenizer: Any = collator.tokenizer
        silent = Encoded(0, "")
        silent.add([tokenizer.pad_token_id])
        prompts = [prompt for document in batch for prompt in document.prompts]
        requests = [request for document in batch for request in document.requests]
        made = collator.batch(prompts or [silent], left=True)
        made = (made if prompts else made.silenced()).to(self.world.device)
        texts = StopStrings(tokenizer, [request.writing.until for request in requests])
        writings = [request.writing for request in requests]
        counted = counter.while_writing(
            self.model.ctx,
            made.is_vision_BS.cpu(),
            np.array([request.doc_id for request in requests]),
            np.array([request.index for request in requests]),
        )
        writing_k = WritingK(len(requests))

        def after_forward() -> None:
            found = counted()
            writing_k.add(found, self.model.ctx.is_valid_T.numel() // len(requests))

        written = generate(
            self.model,
            made,
            max_new_tokens=[limit for document in batch for limit in document.limits] or 1,
            end_ids=self._end_ids,
            any_rank=self.any_rank,
            count=False,
            choose=Sampler(writings, [seed_of(self.seed, request) for request in requests]),
            has_ended=texts if prompts else None,
            after_forward=after_forward if prompts else None,
        )
        cut = [tokens for document in batch for tokens in document.cut]
        is_shown = [document.is_shown and not n for document in batch for n in range(document.rows)]
        return [
            Answer(
                request.key,
                request.doc_id,
                request.index,
                text=texts.text(row, self._without_end(ids)),
                prompt_tokens=len(prompts[row].input_ids),
                written_tokens=len(ids),
                cut_tokens=cut[row],
                tokens=shown_tokens(tokenizer, self._without_end(ids), writing_k.k_B[row])
                if is_shown[row]
                else None,
            )
            for row, (request, ids) in enumerate(
                zip(requests, written.token_ids if requests else [], strict=True)
            )
        ]

    def _without_end(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] in self._end_ids else ids


def seed_of(seed: int, request: Request) -> int:
    """Of what is drawn for a request, on whatever rank and in whatever batch."""
    return int(hashlib.sha256(f"{seed} {request.key}".encode()).hexdigest()[:16], 16)


def _scored(document: Document, contexts: Sequence[dict[int, Scored]]) -> Iterator[Answer]:
    found = {index: scored for context in contexts for index, scored in context.items()}
    lengths = {
        index: (len(context.prompt.input_ids), len(ids))
        for context in document.contexts
        for index, ids in context.continuations.items()
    }
    for place, request in enumerate(document.requests):
        parts = [index for index, of in enumerate(document.asked) if of == place]
        yield Answer(
            request.key,
            request.doc_id,
            request.index,
            log_likelihood=sum((found[index][0] for index in parts), 0.0),
            is_greedy=None if request.kind == "rolling" else all(found[i][1] for i in parts),
            prompt_tokens=sum(lengths[index][0] for index in parts),
            written_tokens=sum(lengths[index][1] for index in parts),
            cut_tokens=document.cut[place],
        )


def answer_blocks(
    answerer: Answerer,
    tasks: Sequence[Task],
    plans: Sequence[TaskPlan],
    blocks: Sequence[Block],
    done: Sequence[np.ndarray],
    writer: PartWriter,
    stop: StopRequest,
) -> None:
    """Every block, its answers and routing into `writer`. Stopped once any rank was asked to stop.
    Collective.

    The next block is read while the model works on this one.
    """
    world = answerer.world
    rounds = dealt(blocks, world.size)
    mine = [of_ranks[world.rank] for of_ranks in rounds]
    nothing = RoutingCounter.of(answerer.model, limit=0)
    total = sum(block.tokens for block in blocks)
    bar = Progress(
        total=total, desc="answering", unit="tok", unit_scale=True, disable=not world.is_first
    )

    def read(block: Block) -> list[Document]:
        plan, task, is_done = plans[block.task], tasks[block.task], done[block.task]
        places = [place for place in range(block.first, block.last) if not is_done[place]]
        docs = plan.doc_D[places].tolist()
        found = answerer.reader.read_all([task.requests_of(doc) for doc in docs], block.work)
        for document, doc in zip(found, docs, strict=True):
            document.is_shown = doc < MAX_SHOWN
        return found

    with ThreadPoolExecutor(1) as ahead, bar:
        coming = iter([block for block in mine if block])
        future = _next(ahead, read, coming)
        for number, (of_ranks, block) in enumerate(zip(rounds, mine, strict=True), 1):
            try:
                stop_together(stop, world, WHERE)
            except Stopped:
                writer.commit(number - 1)
                raise
            work = next(one.work for one in of_ranks if one)
            PROGRESS.enter(GENERATE if work == Work.WRITE else EVALUATE)
            if block:
                assert future is not None
                name, documents = tasks[block.task].name, future.result()
                future = _next(ahead, read, coming)
                answers, counter = answerer.answers(documents, work, writer.counter(name))
                writer.add(name, block.first, block.last, answers, counter)
            else:
                answerer.answers([], work, nothing)
            if answerer.any_rank(writer.is_due):
                writer.commit(number)
            bar.set_description_str(_names(tasks, of_ranks), refresh=False)
            bar.update(sum(one.tokens for one in of_ranks if one))
        writer.commit(len(rounds))


def _next(
    ahead: ThreadPoolExecutor, read: Callable[[Block], list[Document]], coming: Iterator[Block]
) -> Future[list[Document]] | None:
    block = next(coming, None)
    return None if block is None else ahead.submit(read, block)


def _names(tasks: Sequence[Task], blocks: Sequence[Block | None]) -> str:
    return tasks[next(block.task for block in blocks if block)].name
