"""A budget of experts that is met on prompts of benchmarks, where there are no samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from gemoe_ds.engine.world import ALL_RANKS
from gemoe_ds.errors import ConfigError
from gemoe_ds.evaluation.benchmarks.answering import Answerer
from gemoe_ds.evaluation.benchmarks.batch_size import tokens_that_fit
from gemoe_ds.evaluation.benchmarks.reading import Reader, Work
from gemoe_ds.evaluation.benchmarks.tasks import Task
from gemoe_ds.evaluation.routing import RoutingCounter, over_ranks
from gemoe_ds.evaluation.session import Calibration, EvalSession


def spread(tasks: Sequence[Task], number: int) -> Iterator[tuple[Task, int]]:
    """So many documents, evenly over those of all tasks."""
    ends = np.cumsum([task.num_documents for task in tasks])
    total = int(ends[-1])
    for place in np.linspace(0, total, min(number, total), endpoint=False).astype(int).tolist():
        task = int(np.searchsorted(ends, place, side="right"))
        yield tasks[task], place - int(ends[task]) + tasks[task].num_documents


def calibration_on(session: EvalSession, tasks: Sequence[Task], reader: Reader) -> Calibration:
    """The prompts of some documents; a question that is to be answered by writing is read only."""
    world, arguments = session.world, session.arguments
    documents = list(spread(tasks, arguments.calibration_samples))
    mine = documents[world.rank :: world.size]
    together = session.config.ep_size > 1

    def mean_k_L() -> list[float]:
        budget = arguments.batch_tokens
        if not isinstance(budget, int):
            budget = tokens_that_fit(session.model, reader.collator.max_length, world)
        answerer = Answerer(session.model, reader, world, together, session.config.seed, budget)
        counter = RoutingCounter.of(session.model, limit=0)
        for work in Work:
            found = [
                reader.read(requests, work)
                for task, doc in mine
                if reader.size(requests := task.requests_of(doc)).work == work
            ]
            for document in found:
                document.limits = [1] * len(document.limits)
            _, counter = answerer.answers(found, work, counter)
        mean: list[float] = over_ranks(counter.sums, ALL_RANKS, world.device).mean_k_L.tolist()
        return mean

    def loss() -> float:
        raise ConfigError("prompts of benchmarks have no loss: give --calibrate SAMPLES")

    return Calibration(" ".join(task.name for task in tasks), mean_k_L, loss)
