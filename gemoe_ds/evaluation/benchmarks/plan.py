"""Which documents are answered together, and on which rank: the longest ones first.

The blocks do not depend on the number of ranks. Shapes: T tasks, D documents of a task, B blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gemoe_ds.evaluation.benchmarks.reading import Reader, Work
from gemoe_ds.evaluation.benchmarks.tasks import Task


@dataclass(frozen=True, eq=False)
class TaskPlan:
    """A task's documents in the order in which they are answered: by kind of work, by length."""

    doc_D: np.ndarray  # int32, places in the task
    work_D: np.ndarray  # int8
    rows_D: np.ndarray  # int32
    tokens_D: np.ndarray  # int32, of the longest row
    num_requests: int
    fingerprint: str  # of all that is asked

    def blocks(self, budget: int) -> Iterator[tuple[int, int]]:
        """Places from and to: rows times the longest row are within the budget, or it is one."""
        first, rows = 0, 0
        for place, (work, more) in enumerate(zip(self.work_D, self.rows_D.tolist(), strict=True)):
            full = (rows + more) * int(self.tokens_D[first]) > budget
            if place > first and (full or work != self.work_D[first]):
                yield first, place
                first, rows = place, 0
            rows += more
        if self.doc_D.size:
            yield first, self.doc_D.size


def plan_tasks(
    tasks: Sequence[Task],
    reader: Reader,
    gather: Callable[[object], list],
    rank: int,
    num_ranks: int,
) -> list[TaskPlan]:
    """Every rank looks at its share of the documents. Collective."""
    mine = [_sizes(task, range(rank, task.num_documents, num_ranks), reader) for task in tasks]
    ranks = gather(mine)
    plans = []
    for number, task in enumerate(tasks):
        columns_D5 = np.zeros((task.num_documents, 5), np.int64)
        for other, of_tasks in enumerate(ranks):
            columns_D5[other::num_ranks] = of_tasks[number]
        plans.append(_ordered(columns_D5))
    return plans


def _sizes(task: Task, docs: range, reader: Reader) -> np.ndarray:
    """Of each document work, rows, tokens, requests, and a hash of what is asked."""
    columns_D5 = np.zeros((len(docs), 5), np.int64)
    for row, doc in zip(columns_D5, docs, strict=True):
        requests = task.requests_of(doc)
        size = reader.size(requests)
        asked = hashlib.sha256("".join(request.key for request in requests).encode()).digest()
        hashed = int.from_bytes(asked[:8], "little", signed=True)
        row[:] = size.work, size.rows, size.tokens, len(requests), hashed
    return columns_D5


def _ordered(columns_D5: np.ndarray) -> TaskPlan:
    work_D, rows_D, tokens_D, requests_D, _ = columns_D5.T
    order_D = np.lexsort((np.arange(len(work_D)), -tokens_D, work_D))
    return TaskPlan(
        order_D.astype(np.int32),
        work_D[order_D].astype(np.int8),
        rows_D[order_D].astype(np.int32),
        tokens_D[order_D].astype(np.int32),
        int(requests_D.sum()),
        hashlib.sha256(np.ascontiguousarray(columns_D5).tobytes()).hexdigest()[:32],
    )


@dataclass(frozen=True)
class Block:
    """Documents of a task, by their places in its plan."""

    task: int
    work: Work
    first: int
    last: int  # not included
    tokens: int  # rows times the longest row


def blocks_of(plans: Sequence[TaskPlan], budget: int, done: Sequence[np.ndarray]) -> list[Block]:
    """Those with a document that is not done; `done`: of each task, bool by place in its plan."""
    found = []
    for task, plan in enumerate(plans):
        for first, last in plan.blocks(budget):
            if not done[task][first:last].all():
                tokens = int(plan.rows_D[first:last].sum()) * int(plan.tokens_D[first])
                found.append(Block(task, Work(int(plan.work_D[first])), first, last, tokens))
    return found


def dealt(blocks: Sequence[Block], num_ranks: int) -> list[list[Block | None]]:
    """Rounds of one block a rank, None where there is none left of the same kind of work."""
    rounds: list[list[Block | None]] = []
    work = None
    for block in blocks:
        if block.work != work or len(rounds[-1]) == num_ranks:
            rounds.append([])
            work = block.work
        rounds[-1].append(block)
    return [[*some, *[None] * (num_ranks - len(some))] for some in rounds]
